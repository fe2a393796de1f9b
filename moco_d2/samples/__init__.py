"""Makers of the sample pictures: small data sets in the forms of VOC, COCO, LVIS and Cityscapes, drawn on the spot."""
