"""Stage 5: weights and YAML -> a trained, evaluated detector. Importing it registers all names that configs may use."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)
from moco_d2.detection import datasets, published
from moco_d2.detection.backbones import DilatedC5
from moco_d2.detection.roi_heads import Res5ROIHeadsExtraNorm
from moco_d2.detection.segmentation import FCN16sHead

__all__ = ["DilatedC5", "FCN16sHead", "Res5ROIHeadsExtraNorm", "datasets", "published"]
