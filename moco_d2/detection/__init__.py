"""Stage 5: weights and YAML -> a trained, evaluated detector. Importing it registers every name its YAML may use."""

from moco_d2.detection.roi_heads import Res5ROIHeadsExtraNorm

__all__ = ["Res5ROIHeadsExtraNorm"]
