"""Makers of the sample data: small drawn data sets in the formats of VOC, COCO, LVIS and Cityscapes."""
