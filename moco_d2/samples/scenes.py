"""Scenes of the sample data: a few backgrounds, unlabelled clutter and twenty kinds of objects.

A kind is an outline, a texture and a main colour, with the name of a VOC class. No single cue identifies a kind: two
kinds share each of the ten hues, four share each of the five textures, and the clutter has the same hues. Shape,
texture and colour have to be learned together. A small network begins to do so within a hundred steps and is not
finished after a thousand.

Everything is drawn at twice the final size and averaged, so that edges look like those of a photograph.

Letters: S = supersampling factor, H x W = canvas of the scene at that factor, coordinates are (x, y), y downwards.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from moco_d2.samples.shapes import FLIPPED, KINDS, OUTLINES, JointedPerson, box, disc, jointed_person

SUPERSAMPLING = 2
# At least this share of an object's pixels stays visible.
LEAST_VISIBLE = 0.6
_SUBPIXEL_BITS = 4
Range = tuple[float, float]
TEXTURES = ("plain", "stripes", "dots", "checks", "waves")
HUES = 10
# RGB of the backgrounds, which differ by less than the jitter of colours does: sky, grass, sand, asphalt on a dull day.
BACKDROPS = ((132, 137, 142), (125, 131, 120), (140, 134, 124), (122, 122, 126))
# 3 and 10 have no common factor, so the 20 kinds have 20 different pairs of texture and hue.
_KIND_TEXTURE = {kind: TEXTURES[i % len(TEXTURES)] for i, kind in enumerate(KINDS)}
_KIND_HUE = {kind: ((3 * i + i // 10 * 2) % HUES) / HUES for i, kind in enumerate(KINDS)}


@dataclass
class Thing:
    """One drawn object.

    Attributes:
        kind: its name, one of :data:`KINDS`.
        mask: its visible pixels, (H, W) bool at :data:`SUPERSAMPLING` times the picture's size.
        full_area: number of its pixels in the mask's units if nothing covered it or cut it off.
        crowd: whether this is a group of small objects with one label.
        keypoints: of a jointed person, (17, 2) in picture coordinates; some may be hidden or outside.
    """

    kind: str
    mask: np.ndarray
    full_area: float
    crowd: bool = False
    keypoints: np.ndarray | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the visible part, in picture coordinates with half-pixel steps."""
        rows, cols = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        corners = (cols[0], rows[0], cols[-1] + 1, rows[-1] + 1)
        return tuple(float(c) / SUPERSAMPLING for c in corners)  # type: ignore[return-value]

    @property
    def visible(self) -> float:
        """Visible share of the object, 0..1."""
        return float(self.mask.sum()) / self.full_area


@dataclass
class Scene:
    """A picture, (height, width, 3) uint8 RGB, and its objects."""

    image: np.ndarray
    things: list[Thing] = field(default_factory=list)


def colour(rng: np.random.Generator, hue: float, saturation: Range, value: Range) -> np.ndarray:
    """Draw an RGB colour, (3,) in 0..255, with the given hue and ranges of saturation and value."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def clouds(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Draw smooth noise, (height, width) in 0..1, whose features are about ``cell`` pixels wide."""
    rows, cols = max(2, round(height / cell) + 1), max(2, round(width / cell) + 1)
    grid = rng.random((rows, cols), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw one of a few backgrounds: a muted colour in uneven light, with noise that is stronger at larger scales.

    It tells nothing about the objects, and hardly one picture from another: otherwise a network that learns to tell
    pictures apart would learn the backgrounds.
    """
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(angle) / width) + y * np.float32(np.sin(angle) / height)
    light = 1 + np.float32(rng.uniform(0, 0.15)) * along
    layers = [(clouds(rng, height, width, cell) - 0.5) * np.float32(np.sqrt(cell)) for cell in (3, 8, 20)]
    noise = np.sum(layers, axis=0)
    main = np.array(BACKDROPS[rng.integers(len(BACKDROPS))], np.float32)
    canvas: np.ndarray = main * light[..., None] + noise[..., None] * np.float32(10)
    return canvas


def fill(size: tuple[int, ...], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return a bool mask of the given size (H, W) with filled polygons, which are in canvas coordinates."""
    mask = np.zeros(size, np.uint8)
    for part in parts:
        # Pixel centres are at half coordinates; fixed-point coordinates keep rotated edges smooth.
        fixed = np.round((part - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 1, shift=_SUBPIXEL_BITS)
    return mask.astype(bool)


def window(canvas: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Return the corner (x, y) and the slices of the part of a canvas that a shape can touch.

    Drawing only in this part halves the time, because shapes are small.
    """
    corners, limit = np.concatenate(parts), np.array(canvas.shape[1::-1])
    # At least one pixel, also for a shape outside the canvas: OpenCV refuses empty arrays.
    origin = np.clip(np.floor(corners.min(axis=0)).astype(int) - 2, 0, limit - 1)
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 2, 1, limit)
    return origin, np.s_[origin[1] : bottom, origin[0] : right]


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw unlabelled things into the canvas: plain rods and pebbles in the hues of the objects."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(2, 7)):
        size = rng.uniform(0.05, 0.22) * min(height, width)
        shape = disc(0, 0, 0.5, rng.uniform(0.2, 0.5)) if rng.random() < 0.5 else box(-0.7, -0.07, 0.7, 0.07)
        angle, centre = rng.uniform(0, np.pi), rng.uniform((0, 0), (width, height))
        turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
        shape = shape @ turn.T * size + centre
        origin, place = window(canvas, [shape])
        view = canvas[place]
        view[fill(view.shape[:2], [shape - origin])] = colour(rng, rng.random(), (0.2, 0.8), (0.3, 0.9))


def _paint(rng: np.random.Generator, kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the colours, (N, 3), of a kind's texture at object coordinates ``u`` and ``v``, (N,), about -0.5..0.5."""
    hue = _KIND_HUE[kind] + rng.uniform(-0.03, 0.03)
    main = colour(rng, hue, (0.65, 1.0), (0.55, 1.0))
    # The second colour is a dark one of a similar hue, or light grey, so that the first stays recognisable.
    second = colour(rng, hue + 0.08, (0.5, 0.9), (0.1, 0.3)) if rng.random() < 0.5 else np.full(3, 235, np.float32)
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


def _place(
    rng: np.random.Generator, height: int, width: int, scale: Range, border: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Draw a size in pixels, a centre (2,), and the matrix (2, 2) that turns, stretches and mirrors an outline."""
    size = rng.uniform(*scale) * np.sqrt(height * width)
    nearest = border * np.array((width, height))
    centre = rng.uniform(nearest, (width, height) - nearest)
    angle, stretch = rng.normal(0, 0.3), rng.uniform(0.85, 1.18)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    return size, centre, turn @ np.diag((stretch * rng.choice([-1, 1]), 1 / stretch))


def _dress(rng: np.random.Generator, canvas: np.ndarray, person: JointedPerson, parts: Sequence[np.ndarray]) -> None:
    """Paint a person's parts over its silhouette in the canvas, which remains visible as the shirt."""
    shirt = canvas.copy()
    colours = {
        "skin": colour(rng, rng.uniform(0.04, 0.09), (0.25, 0.6), (0.4, 1.0)),
        "trousers": colour(rng, rng.random(), (0.3, 0.8), (0.25, 0.6)),
        "dark": colour(rng, rng.random(), (0.1, 0.4), (0.05, 0.15)),
    }
    for part, material in zip(parts, person.materials, strict=True):
        origin, place = window(canvas, [part])
        view = canvas[place]
        mask = fill(view.shape[:2], [part - origin])
        view[mask] = shirt[place][mask] if material == "shirt" else colours[material]
        if material != "dark":
            _shade_rim(view, mask, 0.75)


def _shade_rim(canvas: np.ndarray, mask: np.ndarray, light: float) -> None:
    """Darken the border, as a shadow does, so that an object stands out from a background of similar colour."""
    rim = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    canvas[rim] *= light


def put(
    rng: np.random.Generator,
    canvas: np.ndarray,
    things: Sequence[Thing],
    shape: str | JointedPerson,
    size: float,
    centre: np.ndarray,
    matrix: np.ndarray,
) -> Thing | None:
    """Try to draw one object over the scene at a given place, and remove the pixels it hides from the other masks.

    Args:
        rng: source of its colours.
        canvas: (H, W, 3), painted in place.
        things: the objects drawn so far.
        shape: a kind, or a jointed person.
        size: the side of the shape's box, in pixels of the canvas.
        centre: the centre of the shape's box, (2,).
        matrix: rotates, stretches or mirrors the shape, (2, 2).

    Returns:
        The object; None, with nothing drawn, if it would hide too much of another or be cut off.
    """
    person = None if isinstance(shape, str) else shape
    kind, outline = (shape, OUTLINES[shape]) if isinstance(shape, str) else ("person", shape.parts)
    parts = [part @ matrix.T * size + centre for part in outline]
    origin, place = window(canvas, parts)
    view = canvas[place]
    mask = fill(view.shape[:2], [part - origin for part in parts])
    margin = int(size)
    shifted = [part - centre + margin for part in parts]
    full_area = float(np.count_nonzero(fill((2 * margin, 2 * margin), shifted)))
    if np.count_nonzero(mask) < LEAST_VISIBLE * full_area:
        return None
    hidden = [np.count_nonzero(thing.mask[place] & mask) for thing in things]
    seen = [np.count_nonzero(thing.mask) for thing in things]
    if any(s - h < LEAST_VISIBLE * thing.full_area for s, h, thing in zip(seen, hidden, things, strict=True)):
        return None
    rows, cols = np.nonzero(mask)
    points = np.stack([cols, rows]) + origin[:, None] + 0.5
    u, v = np.linalg.inv(matrix) @ ((points - centre[:, None]) / size)
    view[rows, cols] = _paint(rng, kind, u, v)
    keypoints = None
    if person:
        _dress(rng, view, person, [part - origin for part in parts])
        keypoints = (person.keypoints @ matrix.T * size + centre) / SUPERSAMPLING
        keypoints = keypoints[FLIPPED] if np.linalg.det(matrix) < 0 else keypoints
    _shade_rim(view, mask, 0.55)
    for thing in things:
        thing.mask[place] &= ~mask
    whole = np.zeros(canvas.shape[:2], bool)
    whole[place] = mask
    return Thing(kind, whole, full_area, keypoints=keypoints)


def _draw(
    rng: np.random.Generator,
    canvas: np.ndarray,
    things: list[Thing],
    shape: str | JointedPerson,
    scale: Range,
    border: float = 0.1,
) -> Thing | None:
    """Try to draw one object at a random place."""
    height, width = canvas.shape[:2]
    return put(rng, canvas, things, shape, *_place(rng, height, width, scale, border))


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray, things: list[Thing], kind: str) -> Thing | None:
    """Draw small objects of one kind as a single crowd; None if there is no room."""
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
    jointed: bool = False,
    clutter: bool = True,
    border: float = 0.1,
) -> Scene:
    """Draw one picture.

    Args:
        rng: source of every random choice; the same state gives the same picture.
        height: of the picture in pixels.
        width: of the picture in pixels.
        kinds: the objects in order; later ones may cover parts of earlier ones. The first is always drawn; a later one
            is left out if no place is found where enough of all objects stays visible.
        scale: range of an object's longest side, as a share of the square root of the picture's area.
        crowd: the kind of a crowd to draw, or None.
        jointed: whether persons have joints and a pose, instead of the outline of their kind.
        clutter: whether there are unlabelled things between background and objects.
        border: least distance of an object's centre from each side, as a share of the picture's width or height.

    Returns:
        The picture and its objects.
    """
    # The background has no sharp edges, so it is drawn at the final size in a quarter of the time.
    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    canvas = cv2.resize(_background(rng, height, width), size, interpolation=cv2.INTER_LINEAR)
    if clutter:
        _clutter(rng, canvas)
    things: list[Thing] = []
    for kind in kinds:
        for _ in range(50 if not things else 6):
            shape = jointed_person(rng) if jointed and kind == "person" else kind
            thing = _draw(rng, canvas, things, shape, scale, border)
            if thing:
                things.append(thing)
                break
    if crowd and (herd := _draw_crowd(rng, canvas, things, crowd)):
        things.append(herd)
    return Scene(develop(rng, canvas, exposure=(1, 1), noise=(4, 4)), things)


def develop(rng: np.random.Generator, canvas: np.ndarray, exposure: Range, noise: Range) -> np.ndarray:
    """Average a canvas down to a picture, (height, width, 3) uint8.

    Args:
        rng: source of exposure and noise.
        canvas: (H, W, 3).
        exposure: range of the factor of all pixel values.
        noise: range of the standard deviation of the noise, in pixel values.
    """
    height, width = (side // SUPERSAMPLING for side in canvas.shape[:2])
    canvas = canvas * np.float32(rng.uniform(*exposure))
    small: np.ndarray = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    small += np.asarray(rng.normal(0, rng.uniform(*noise), small.shape), np.float32)
    picture: np.ndarray = np.clip(small, 0, 255).astype(np.uint8)
    return picture
