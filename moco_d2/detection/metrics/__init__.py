"""Evaluators: AP for VOC, COCO and LVIS, by the fastest library that is installed, with the reference's numbers."""
