"""Pages about what a backbone sees: a ViT's attention maps, and the nearest neighbours of pictures."""

from __future__ import annotations

import html
import math
import os
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from PIL import Image

from moco_d2.data.labelled import LabelledSet
from moco_d2.facts import ViTFacts
from moco_d2.io.files import empty_folder
from moco_d2.layers.vit import class_attention
from moco_d2.probes.backbone import Backbone
from moco_d2.probes.features import features_of
from moco_d2.reports.page import figure, write_page
from moco_d2.running.picture_check import evenly

_COLUMNS = 7  # of maps
_GAP = 6  # pixels between them
_CELL = 160  # least width of a map in pixels; smaller ones are enlarged
_SIZE = 480 / 224  # DINO's pictures for attention maps, as a multiple of those of pretraining
_THUMB = 224


def attention_page(
    backbone: Backbone, pictures: LabelledSet, folder: str | os.PathLike[str], cfg: CfgNode, count: int, size: int = 0
) -> Path:
    """Draw where the class token of a ViT's last block looks, head by head (DINO, figures 1 and 3).

    A page has a PNG for each picture: the picture, the mean over the heads, then each head. A map shows the attention
    to each patch, from 0 (dark) to the map's largest (yellow).

    Args:
        backbone: a ViT.
        pictures: of which ``count`` are drawn, evenly spaced.
        folder: of the page; new or empty.
        cfg: MODEL.DEVICE and DATA.MAX_PIXELS.
        count: number of pictures.
        size: shorter side of the pictures in pixels; 0: 480 for a ViT that was pretrained at 224, and in proportion.

    Raises:
        ValueError: the backbone is no ViT, the pictures are smaller than a patch, or the folder is not empty.
        PictureError: a picture cannot be read.
    """
    if not isinstance(backbone.facts, ViTFacts):
        raise ValueError(
            f"{backbone.path} is a {backbone.facts.network}, which has no class token: attention maps need a ViT"
        )
    size, patch = size or round(_SIZE * backbone.facts.image), backbone.facts.patch
    if size < patch:
        raise ValueError(f"--size is {size}; it must be at least {patch} pixels, the size of a patch")
    folder = empty_folder(folder, "--output")
    backbone.network.to(cfg.MODEL.DEVICE)
    figures = []
    for number in evenly(len(pictures), count):
        image = pictures.picture(number, cfg.DATA.MAX_PIXELS)
        scale = size / min(image.size)
        # The shorter side has `size`; both are cut to whole patches.
        resized = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        width, height = (side // patch * patch for side in resized.size)
        seen = resized.crop((0, 0, width, height))
        maps = class_attention(backbone.network, _normalised(seen, backbone, cfg.MODEL.DEVICE))[0].cpu()
        caption = f"{_name(pictures, number)}: the picture, the mean of {len(maps)} heads, then each head"
        figures.append(figure(folder, f"{number:05d}", _tiles(np.asarray(seen), maps, patch), caption, "png", 2000))
    text = (
        f"<p>{_described(backbone)} Attention of the last block's class token to the patches of {len(figures)} "
        f"pictures of {html.escape(pictures.name)}, {size} pixels high or wide; a map's brightest patch has its "
        "largest value.</p>"
    )
    return write_page(folder, "Attention of the class token", text + "".join(figures))


def _normalised(image: Image.Image, backbone: Backbone, device: str) -> torch.Tensor:
    """Return a picture as the network takes it: (1, 3, H, W)."""
    pixels = backbone.facts.pixels
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    values = values if pixels.order == "RGB" else values.flip(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pixels.mean, pixels.std))
    return ((values - mean) / std)[None].to(device)


def _tiles(picture: np.ndarray, maps: torch.Tensor, patch: int) -> np.ndarray:
    """Return the picture, the mean map and all maps, each of the picture's size, in rows."""
    colours = matplotlib.colormaps["viridis"]
    cells = [picture]
    for one in torch.cat([maps.mean(0, keepdim=True), maps]):
        values = (one / one.max()).numpy().repeat(patch, 0).repeat(patch, 1)
        cells.append((colours(values)[..., :3] * 255).astype(np.uint8))
    enlarged = max(1, math.ceil(_CELL / picture.shape[1]))
    cells = [cell.repeat(enlarged, 0).repeat(enlarged, 1) for cell in cells]
    rows = math.ceil(len(cells) / _COLUMNS)
    columns = math.ceil(len(cells) / rows)
    height, width = (side + _GAP for side in cells[0].shape[:2])
    sheet = np.full((rows * height - _GAP, columns * width - _GAP, 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def neighbours_page(
    backbone: Backbone,
    pictures: LabelledSet,
    folder: str | os.PathLike[str],
    cfg: CfgNode,
    size: int,
    count: int,
    k: int = 8,
    queries: LabelledSet | None = None,
) -> Path:
    """Draw the pictures of a set whose features are most similar to those of query pictures.

    Both are seen under the test transform of probes; the similarity is the cosine of the features.

    Args:
        backbone: of any kind.
        pictures: in which the neighbours are sought.
        folder: of the page; new or empty.
        cfg: see :func:`moco_d2.probes.features.features_of`.
        size: side of the crops in pixels.
        count: most queries, evenly spaced.
        k: neighbours of each query.
        queries: pictures to ask for; None: ``pictures``. A picture is no neighbour of itself.

    Raises:
        ValueError: the folder is not empty, or there are no more than ``k`` pictures.
        PictureError: too many pictures cannot be read.
    """
    if len(pictures) <= k:
        raise ValueError(f"{pictures.name} has {len(pictures)} pictures; {k} neighbours need more than {k}")
    folder = empty_folder(folder, "--output")
    backbone.network.to(cfg.MODEL.DEVICE)
    asked = pictures if queries is None else queries
    chosen = asked.part(evenly(len(asked), count))
    bank, found = (features_of(backbone, one, cfg, size) for one in (pictures, chosen))
    values, similar = F.normalize(bank.values, dim=1), F.normalize(found.values, dim=1)
    paths = [os.path.realpath(path) for path in pictures.files] if pictures.boxes is None else []
    number_of = {path: number for number, path in enumerate(paths)}
    rows = []
    for number, feature in zip(found.labels.tolist(), similar, strict=True):
        itself = number if queries is None else number_of.get(os.path.realpath(asked.files[number]), -1)
        # The labels are the pictures' numbers.
        similarity = (values @ feature).masked_fill(bank.labels == itself, -torch.inf)
        best = similarity.topk(min(k, len(similarity) - 1))
        shown = [_thumb(folder, asked, number, f"{number:05d}-query", "query", cfg)]
        numbers = bank.labels[best.indices].tolist()
        for rank, (value, which) in enumerate(zip(best.values.tolist(), numbers, strict=True)):
            shown.append(_thumb(folder, pictures, which, f"{number:05d}-{rank}", f"{value:.3f}", cfg))
        rows.append(f'<div class="row">{"".join(shown)}</div>')
    text = (
        f"<p>{_described(backbone)} A row has a query of {html.escape(asked.name)}, and its nearest of the "
        f"{len(bank.labels)} pictures of {html.escape(pictures.name)} with the cosine of the features, at {size} "
        "pixels.</p>"
    )
    return write_page(folder, "Nearest neighbours", text + "".join(rows))


def _thumb(folder: Path, pictures: LabelledSet, number: int, name: str, words: str, cfg: CfgNode) -> str:
    image = pictures.picture(number, cfg.DATA.MAX_PIXELS)
    if max(image.size) < _THUMB:
        factor = _THUMB // max(image.size)
        image = image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)
    return figure(folder, name, np.asarray(image), f"{words}: {_name(pictures, number)}", "png", _THUMB)


def _described(backbone: Backbone) -> str:
    return html.escape(f"{backbone.path}: {backbone.facts.network} ({backbone.facts.origin}).")


def _name(pictures: LabelledSet, number: int) -> str:
    """Return a picture's file with its folder, which may be its class."""
    return "/".join(Path(pictures.files[number]).parts[-2:])
