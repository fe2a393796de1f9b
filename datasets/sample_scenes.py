"""Draws the sample data's scenes: textured backgrounds, unlabelled clutter and twenty kinds of objects.

A kind is an outline, a texture and a main colour under the name of a VOC class. Five textures and ten hues are dealt
out so that no single cue names a kind: every hue serves two kinds and every texture four, and the clutter wears the
same hues in plain fields. Shape, texture and colour have to be learned together, which a small network can begin to do
within a hundred steps and does not finish in a thousand.

Everything is drawn at twice the final size and averaged down, so that edges look like those of a photograph.

Letters: S = supersampling factor, H x W = canvas of the scene at that factor, coordinates are (x, y), y downwards.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

SUPERSAMPLING = 2
# An object keeps at least this share of its own pixels in view, whatever covers it or cuts it off.
LEAST_VISIBLE = 0.6
_SUBPIXEL_BITS = 4
Outline = tuple[np.ndarray, ...]
Range = tuple[float, float]


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _disc(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + (ry or rx) * np.sin(angle)], axis=1)


def _poly(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


def _legs(top: float, *lefts: float) -> Outline:
    return tuple(_box(x, top, x + 0.1, 0.44) for x in lefts)


# Unions of convex or simple parts, in a box of side 1 around the origin.
OUTLINES: dict[str, Outline] = {
    "aeroplane": (
        _poly((0, -0.5), (0.08, -0.36), (0.09, 0.3), (0.04, 0.45), (-0.04, 0.45), (-0.09, 0.3), (-0.08, -0.36)),
        _poly((0, -0.16), (0.5, 0.12), (0.5, 0.24), (0, 0.12), (-0.5, 0.24), (-0.5, 0.12)),
        _poly((0, 0.3), (0.22, 0.42), (0.22, 0.5), (-0.22, 0.5), (-0.22, 0.42)),
    ),
    "bicycle": (
        _disc(-0.29, 0.2, 0.21),
        _disc(0.29, 0.2, 0.21),
        _poly((-0.3, 0.22), (-0.14, -0.18), (0.2, -0.18), (0.04, 0.22)),
        _poly((0.14, -0.34), (0.23, -0.34), (0.34, 0.2), (0.24, 0.2)),
        _box(-0.22, -0.28, -0.04, -0.16),
    ),
    "bird": (
        _disc(0, 0.06, 0.28, 0.17),
        _disc(0.27, -0.12, 0.13),
        _poly((0.36, -0.2), (0.5, -0.1), (0.36, -0.04)),
        _poly((-0.18, 0.02), (-0.5, -0.1), (-0.46, 0.14)),
        _poly((-0.14, 0.02), (0.12, 0.02), (-0.18, -0.44)),
    ),
    "boat": (
        _poly((-0.5, 0.16), (0.5, 0.16), (0.32, 0.44), (-0.32, 0.44)),
        _box(-0.04, -0.5, 0.04, 0.18),
        _poly((0.03, -0.46), (0.42, 0.08), (0.03, 0.08)),
        _poly((-0.03, -0.34), (-0.03, 0.08), (-0.34, 0.08)),
    ),
    "bottle": (
        _box(-0.08, -0.5, 0.08, -0.18),
        _poly((-0.08, -0.24), (0.08, -0.24), (0.19, -0.02), (0.19, 0.5), (-0.19, 0.5), (-0.19, -0.02)),
    ),
    "bus": (_box(-0.5, -0.3, 0.5, 0.22), _disc(-0.28, 0.24, 0.11), _disc(0.28, 0.24, 0.11)),
    "car": (
        _poly((-0.5, 0.0), (-0.34, -0.02), (-0.2, -0.24), (0.16, -0.24), (0.32, -0.01), (0.5, 0.04), (0.5, 0.18)),
        _box(-0.5, 0.0, 0.5, 0.18),
        _disc(-0.28, 0.18, 0.12),
        _disc(0.29, 0.18, 0.12),
    ),
    "cat": (
        _disc(0, 0.1, 0.4, 0.36),
        _poly((-0.4, 0.04), (-0.37, -0.5), (-0.06, -0.2)),
        _poly((0.4, 0.04), (0.37, -0.5), (0.06, -0.2)),
    ),
    "chair": (_box(-0.3, -0.5, -0.18, 0.5), _box(-0.3, 0, 0.3, 0.13), _box(0.18, 0.02, 0.3, 0.5)),
    "cow": (
        _box(-0.36, -0.2, 0.28, 0.16),
        *_legs(0.1, -0.35, -0.2, 0.04, 0.17),
        _disc(0.36, -0.18, 0.14, 0.11),
        _poly((0.26, -0.24), (0.24, -0.42), (0.38, -0.26)),
    ),
    "diningtable": (_box(-0.5, -0.26, 0.5, -0.06), _box(-0.42, -0.1, -0.3, 0.32), _box(0.3, -0.1, 0.42, 0.32)),
    "dog": (
        _disc(-0.04, 0.05, 0.32, 0.15),
        _disc(0.3, -0.16, 0.15, 0.13),
        _box(0.34, -0.18, 0.5, -0.06),
        *_legs(0.08, -0.3, 0.14),
        _poly((-0.3, 0.06), (-0.5, -0.3), (-0.4, -0.32), (-0.22, -0.04)),
    ),
    "horse": (
        _disc(-0.08, 0.02, 0.3, 0.15),
        _poly((0.06, 0.0), (0.18, -0.48), (0.34, -0.48), (0.24, 0.06)),
        _poly((0.2, -0.5), (0.5, -0.32), (0.45, -0.2), (0.24, -0.3)),
        *_legs(0.06, -0.34, -0.2, 0.0, 0.12),
    ),
    "motorbike": (
        _disc(-0.3, 0.2, 0.19),
        _disc(0.3, 0.2, 0.19),
        _poly((-0.44, -0.12), (0.1, -0.16), (0.22, -0.34), (0.32, -0.3), (0.32, 0.14), (-0.2, 0.18)),
    ),
    "person": (
        _disc(0, -0.37, 0.12, 0.13),
        _poly((-0.23, -0.24), (0.23, -0.24), (0.15, 0.1), (-0.15, 0.1)),
        _poly((-0.15, 0.08), (0.0, 0.08), (-0.06, 0.5), (-0.19, 0.5)),
        _poly((0.15, 0.08), (0.0, 0.08), (0.06, 0.5), (0.19, 0.5)),
    ),
    "pottedplant": (
        _poly((-0.23, 0.1), (0.23, 0.1), (0.14, 0.5), (-0.14, 0.5)),
        _disc(0, -0.27, 0.15, 0.23),
        _disc(-0.21, -0.08, 0.2, 0.13),
        _disc(0.21, -0.08, 0.2, 0.13),
    ),
    "sheep": (
        *(_disc(x, y, 0.19) for x, y in ((-0.22, -0.06), (-0.04, -0.16), (0.16, -0.06), (-0.04, 0.08))),
        _disc(-0.04, 0.02, 0.34, 0.17),
        _disc(0.37, -0.04, 0.12, 0.15),
        *_legs(0.1, -0.24, 0.1),
    ),
    "sofa": (
        _box(-0.5, 0.0, 0.5, 0.3),
        _box(-0.38, -0.3, 0.38, 0.1),
        _box(-0.5, -0.14, -0.36, 0.3),
        _box(0.36, -0.14, 0.5, 0.3),
    ),
    "train": (
        _poly((-0.27, 0.3), (-0.27, -0.32), (-0.13, -0.5), (0.13, -0.5), (0.27, -0.32), (0.27, 0.3)),
        _poly((-0.25, 0.26), (0.25, 0.26), (0.4, 0.5), (-0.4, 0.5)),
    ),
    "tvmonitor": (_box(-0.48, -0.4, 0.48, 0.22), _box(-0.08, 0.2, 0.08, 0.38), _box(-0.26, 0.32, 0.26, 0.42)),
}
KINDS = tuple(OUTLINES)
TEXTURES = ("plain", "stripes", "dots", "checks", "waves")
HUES = 10
# 3 and 10 have no common factor, so that texture and hue run through different combinations: 20 kinds, 20 pairs.
_KIND_TEXTURE = {kind: TEXTURES[i % len(TEXTURES)] for i, kind in enumerate(KINDS)}
_KIND_HUE = {kind: ((3 * i + i // 10 * 2) % HUES) / HUES for i, kind in enumerate(KINDS)}


@dataclass
class Thing:
    """One drawn object.

    Attributes:
        kind: its name, one of :data:`KINDS`.
        mask: what is still seen of it, (H, W) bool at :data:`SUPERSAMPLING` times the picture's size.
        full_area: its pixels had nothing covered it or cut it off, in the mask's units.
        crowd: whether this is a group of small objects that are not told apart.
    """

    kind: str
    mask: np.ndarray
    full_area: float
    crowd: bool = False

    @property
    def visible(self) -> float:
        """Share of the object that can be seen, 0..1."""
        return float(self.mask.sum()) / self.full_area


@dataclass
class Scene:
    """A picture and what is on it: ``image`` is (height, width, 3) uint8 RGB."""

    image: np.ndarray
    things: list[Thing] = field(default_factory=list)


def _colour(rng: np.random.Generator, hue: float, saturation: Range, value: Range) -> np.ndarray:
    """Draw an RGB colour, (3,) in 0..255, with the given hue and ranges of saturation and value."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _clouds(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Draw smooth noise, (height, width) in 0..1, whose features are about ``cell`` pixels wide."""
    rows, cols = max(2, round(height / cell) + 1), max(2, round(width / cell) + 1)
    grid = rng.random((rows, cols), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a muted background: a gradient, clouds, stripes or blobs between two colours, with fine clouds on top."""
    first, second = (_colour(rng, rng.random(), (0.05, 0.45), (0.25, 0.9)) for _ in range(2))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, style = rng.uniform(0, np.pi), rng.choice(["gradient", "clouds", "stripes", "blobs"])
    along = x * np.cos(angle, dtype=np.float32) + y * np.sin(angle, dtype=np.float32)
    if style == "gradient":
        mix = (along - along.min()) / (along.max() - along.min())
    elif style == "clouds":
        mix = _clouds(rng, height, width, rng.uniform(12, 45))
    elif style == "stripes":
        mix = 0.5 + 0.5 * np.sin(along * (2 * np.pi / rng.uniform(8, 35)) + rng.uniform(0, 6))
    else:
        mix = (_clouds(rng, height, width, rng.uniform(8, 30)) > 0.5).astype(np.float32)
    canvas: np.ndarray = first + (second - first) * mix[..., None]
    canvas += (_clouds(rng, height, width, rng.uniform(2, 6)) - 0.5)[..., None] * np.float32(rng.uniform(10, 60))
    return canvas


def _fill(height: int, width: int, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Fill polygons, given in canvas coordinates, into an (H, W) bool mask."""
    mask = np.zeros((height, width), np.uint8)
    for part in parts:
        # Pixel centres lie at half coordinates; fixed point keeps the rotation smooth.
        fixed = np.round((part - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 1, shift=_SUBPIXEL_BITS)
    return mask.astype(bool)


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw things without a name into the canvas: plain rods and pebbles in the hues that objects wear."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(2, 7)):
        size = rng.uniform(0.05, 0.22) * min(height, width)
        shape = _disc(0, 0, 0.5, rng.uniform(0.2, 0.5)) if rng.random() < 0.5 else _box(-0.7, -0.07, 0.7, 0.07)
        angle, centre = rng.uniform(0, np.pi), rng.uniform((0, 0), (width, height))
        turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
        mask = _fill(height, width, [shape @ turn.T * size + centre])
        canvas[mask] = _colour(rng, rng.random(), (0.2, 0.8), (0.3, 0.9))


def _paint(rng: np.random.Generator, kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the colours, (N, 3), of a kind's texture at object coordinates ``u`` and ``v``, (N,), about -0.5..0.5."""
    hue = _KIND_HUE[kind] + rng.uniform(-0.03, 0.03)
    main = _colour(rng, hue, (0.65, 1.0), (0.55, 1.0))
    # The second colour is dark or light of a near hue, so that it does not hide the first.
    second = _colour(rng, hue + 0.08, (0.5, 0.9), (0.1, 0.3)) if rng.random() < 0.5 else np.full(3, 235, np.float32)
    period = rng.uniform(0.17, 0.23)
    phase = rng.uniform(0, period)
    texture = _KIND_TEXTURE[kind]
    if texture == "stripes":
        pattern = (u + phase) % period < period / 2
    elif texture == "dots":
        pattern = np.hypot((u + phase) % period - period / 2, (v + phase) % period - period / 2) < 0.32 * period
    elif texture == "checks":
        pattern = ((u + phase) % period < period / 2) ^ (v % period < period / 2)
    elif texture == "waves":
        pattern = (v + 0.06 * np.sin(u * 2 * np.pi / 0.35) + phase) % period < period / 2
    else:
        pattern = np.zeros(u.shape, bool)
    light = 1 + rng.uniform(0.1, 0.3) * (rng.choice([-1, 1]) * u - v)
    colours: np.ndarray = np.where(pattern[:, None], second, main) * light[:, None].astype(np.float32)
    return colours


def _place(rng: np.random.Generator, height: int, width: int, scale: Range) -> tuple[float, np.ndarray, np.ndarray]:
    """Draw a size in pixels, a centre (2,), and the matrix (2, 2) that turns, stretches and mirrors an outline."""
    size = rng.uniform(*scale) * np.sqrt(height * width)
    centre = rng.uniform((0.1 * width, 0.1 * height), (0.9 * width, 0.9 * height))
    angle, stretch = rng.normal(0, 0.3), rng.uniform(0.85, 1.18)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    return size, centre, turn @ np.diag((stretch * rng.choice([-1, 1]), 1 / stretch))


def _draw(rng: np.random.Generator, canvas: np.ndarray, things: list[Thing], kind: str, scale: Range) -> Thing | None:
    """Try to draw one object over the scene; None (and nothing drawn) if it would hide too much or be cut off."""
    height, width = canvas.shape[:2]
    size, centre, matrix = _place(rng, height, width, scale)
    parts = [part @ matrix.T * size + centre for part in OUTLINES[kind]]
    mask = _fill(height, width, parts)
    margin = int(size)
    shifted = [part - centre + margin for part in parts]
    full_area = float(_fill(2 * margin, 2 * margin, shifted).sum())
    if mask.sum() < LEAST_VISIBLE * full_area:
        return None
    if any((thing.mask & ~mask).sum() < LEAST_VISIBLE * thing.full_area for thing in things):
        return None
    rows, cols = np.nonzero(mask)
    u, v = np.linalg.inv(matrix) @ ((np.stack([cols, rows]) + 0.5 - centre[:, None]) / size)
    canvas[rows, cols] = _paint(rng, kind, u, v)
    # A thin dark rim, as shadows give: without it an object and a like-coloured background run into each other.
    rim = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    canvas[rim] *= 0.55
    for thing in things:
        thing.mask &= ~mask
    return Thing(kind, mask, full_area)


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray, things: list[Thing], kind: str) -> Thing | None:
    """Draw a herd of small objects of one kind as a single crowd; None if no room was found."""
    herd: list[Thing] = []
    for _ in range(12):
        member = _draw(rng, canvas, things + herd, kind, (0.09, 0.12))
        herd += [member] if member else []
    if not herd:
        return None
    mask = np.logical_or.reduce([member.mask for member in herd])
    return Thing(kind, mask, float(mask.sum()), crowd=True)


def draw_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    kinds: Sequence[str],
    scale: Range = (0.2, 0.6),
    crowd: str | None = None,
) -> Scene:
    """Draw one picture.

    Args:
        rng: source of every random choice; the same state gives the same picture.
        height: of the picture in pixels.
        width: of the picture in pixels.
        kinds: what to draw, in order; later things may cover parts of earlier ones. The first is always drawn; a later
            one is left out if no place is found where enough of everything stays visible.
        scale: range of an object's longest side, as a share of the square root of the picture's area.
        crowd: a kind to draw a crowd of, if any.

    Returns:
        The picture and its objects.
    """
    # The background has no edges worth supersampling, and a quarter of the pixels is a quarter of the time.
    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    canvas = cv2.resize(_background(rng, height, width), size, interpolation=cv2.INTER_LINEAR)
    _clutter(rng, canvas)
    things: list[Thing] = []
    for kind in kinds:
        for _ in range(50 if not things else 6):
            thing = _draw(rng, canvas, things, kind, scale)
            if thing:
                things.append(thing)
                break
    if crowd and (herd := _draw_crowd(rng, canvas, things, crowd)):
        things.append(herd)
    canvas = canvas * np.float32(rng.uniform(0.75, 1.15))
    small: np.ndarray = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    small += np.asarray(rng.normal(0, rng.uniform(2, 7), small.shape), np.float32)
    return Scene(np.clip(small, 0, 255).astype(np.uint8), things)
