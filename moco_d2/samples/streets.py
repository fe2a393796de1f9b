"""Streets of the sample data: road, sidewalk, buildings and trees, with cars, persons and other objects.

Labels are as in Cityscapes: a list of outlines in the order of painting, each over the earlier ones. The camera is two
metres above a flat ground, so nearer objects are lower in the picture and larger.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from moco_d2.samples.scenes import SUPERSAMPLING, Range, Thing, clouds, colour, develop, fill, put, window
from moco_d2.samples.shapes import OUTLINES, JointedPerson, box, disc, jointed_person

# Cityscapes' names, and the side of a shape's box in units of the camera's height: a car is four metres long.
TRAFFIC = {"car": ("car", 2.0), "bus": ("bus", 3.0), "bicycle": ("bicycle", 1.0), "motorbike": ("motorcycle", 1.1)}
PERSON_SIZE = 0.85


@dataclass
class Street:
    """A picture and its outlines.

    Attributes:
        image: (height, width, 3) uint8 RGB.
        outlines: label and polygon, (N, 2) whole pixels (x, y), from back to front. A label that ends in ``group``
            stands for several objects together.
    """

    image: np.ndarray
    outlines: list[tuple[str, np.ndarray]] = field(default_factory=list)


class _Painter:
    """A street that is being drawn. Coordinates are those of the picture; the canvas is larger."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.horizon = height * rng.uniform(0.4, 0.46)
        self.vanishing = width * rng.uniform(0.4, 0.6)
        self.canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING, 3), np.float32)
        grain = clouds(rng, height, width, 3) - 0.5
        self.grain = cv2.resize(grain, self.canvas.shape[1::-1])[..., None]
        self.outlines: list[tuple[str, np.ndarray]] = []
        self.things: list[Thing] = []

    def paint(self, polygon: np.ndarray, hue: float, saturation: Range, value: Range, grain: float = 12) -> np.ndarray:
        """Paint a polygon and return it in whole pixels; a corner on the last pixel extends to the picture's edge."""
        last = np.array([self.width - 1, self.height - 1])
        pixels: np.ndarray = np.clip(np.round(polygon), 0, last).astype(int)
        reach = np.where(pixels == last, last + 1, np.where(pixels == 0, 0.0, pixels + 0.5))
        origin, place = window(self.canvas, [reach * SUPERSAMPLING])
        view = self.canvas[place]
        mask = fill(view.shape[:2], [reach * SUPERSAMPLING - origin])
        view[mask] = colour(self.rng, hue, saturation, value) + grain * self.grain[place][mask]
        return pixels

    def area(self, label: str, polygon: np.ndarray, hue: float, saturation: Range, value: Range) -> None:
        """Paint a polygon and add its outline."""
        self.outlines.append((label, self.paint(polygon, hue, saturation, value)))

    def road_edges(self, ground: float) -> tuple[float, float]:
        """Return the x coordinates of the road's edges at a y coordinate."""
        depth = ground - self.horizon
        return self.vanishing - 4 - 2.2 * depth, self.vanishing + 4 + 2.2 * depth

    def backdrop(self) -> None:
        """Paint sky, buildings and trees."""
        rng = self.rng
        self.area("sky", box(0, 0, self.width, self.height), 0.58, (0.05, 0.35), (0.7, 0.95))
        left = -rng.uniform(0, 20)
        while left < self.width:
            right, top = left + rng.uniform(28, 60), rng.uniform(0.05, 0.6) * self.horizon
            if rng.random() < 0.8:
                self.area("building", box(left, top, right, self.horizon + 6), rng.random(), (0.05, 0.3), (0.3, 0.7))
                for x in np.arange(max(left, 0) + 4, min(right, self.width) - 6, 9):
                    for y in np.arange(top + 5, self.horizon - 8, 11):
                        self.paint(box(x, y, x + 4, y + 6), 0.6, (0.1, 0.4), (0.15, 0.4))
            left = right
        for _ in range(rng.integers(1, 4)):
            radius, x = rng.uniform(8, 16), rng.uniform(0, self.width)
            tree = disc(x, self.horizon - 0.5 * radius, 1.2 * radius, radius) + rng.normal(0, 1, (28, 2))
            self.area("vegetation", tree, 0.28, (0.4, 0.7), (0.2, 0.5))

    def ground(self) -> None:
        """Paint the sidewalk, and the road with its lane marks."""
        bottom, x = self.height, self.vanishing
        self.area("sidewalk", box(0, self.horizon, self.width, bottom), 0.08, (0.05, 0.2), (0.5, 0.7))
        # The y coordinates at which the road's edges leave the picture.
        reach = np.array([x, self.width - x])
        left, right = self.horizon + (reach - 4) / 2.2
        road = [(x - 4, self.horizon), (x + 4, self.horizon), (self.width, right), (self.width, bottom)]
        self.area("road", np.array([*road, (0, bottom), (0, left)]), 0.65, (0.02, 0.12), (0.28, 0.42))
        for near in self.horizon + np.array([8, 16, 30, 54]):
            far = near - 0.3 * (near - self.horizon)
            half = 0.03 * (np.array([near, far]) - self.horizon)
            mark = [(x - half[0], near), (x + half[0], near), (x + half[1], far), (x - half[1], far)]
            self.paint(np.array(mark), 0.15, (0, 0.1), (0.85, 0.95))

    def post(self) -> None:
        """Draw a pole with a traffic sign or a traffic light beside the road."""
        rng, ground = self.rng, self.horizon + self.rng.uniform(10, 22)
        left, right = self.road_edges(ground)
        x = rng.choice([left - 8, right + 8])
        tall = 1.5 * (ground - self.horizon) + 14
        self.area("pole", box(x - 1, ground - tall, x + 1, ground), 0.6, (0, 0.1), (0.25, 0.4))
        if rng.random() < 0.5:
            self.area("traffic sign", disc(x, ground - tall, 5), rng.choice([0.0, 0.62]), (0.8, 1), (0.6, 0.9))
        else:
            self.area("traffic light", box(x - 3, ground - tall - 6, x + 3, ground - tall + 8), 0, (0, 0.1), (0.1, 0.2))
            lit, hue = ((-5, 0.0), (3, 0.36))[rng.integers(2)]
            self.paint(box(x - 1, ground - tall + lit, x + 2, ground - tall + lit + 3), hue, (0.9, 1), (0.9, 1))

    def stand(self, shape: str | JointedPerson, x: float, ground: float, scale: float) -> Thing | None:
        """Draw a thing that stands on the ground; None if it would be cut off or hide too much of another."""
        size = scale * (ground - self.horizon)
        foot = max(part[:, 1].max() for part in (OUTLINES[shape] if isinstance(shape, str) else shape.parts))
        matrix = np.diag((self.rng.choice([-1.0, 1.0]), 1.0))
        centre = np.array([x, ground - foot * size]) * SUPERSAMPLING
        thing = put(self.rng, self.canvas, self.things, shape, size * SUPERSAMPLING, centre, matrix)
        self.things += [thing] if thing else []
        return thing

    def outline(self, label: str, mask: np.ndarray) -> None:
        """Add a label with a mask's outline, or that of its largest part."""
        blocks = mask.reshape(self.height, SUPERSAMPLING, self.width, SUPERSAMPLING).sum(axis=(1, 3))
        small = (blocks >= SUPERSAMPLING**2 / 2).astype(np.uint8)
        contours, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        self.outlines.append((label, max(contours, key=cv2.contourArea)[:, 0]))

    def group(self) -> None:
        """Draw a group of persons at a distance."""
        ground = self.horizon + self.rng.uniform(14, 18)
        left, right = self.road_edges(ground)
        side, x = self.rng.choice([-1, 1]), self.rng.choice([left, right])
        step = side * 0.3 * (ground - self.horizon)
        persons = (jointed_person(self.rng, walking=True) for _ in range(5))
        members = [self.stand(p, x + i * step, ground, PERSON_SIZE) for i, p in enumerate(persons, start=1)]
        masks = [member.mask for member in members if member]
        if masks:
            self.outline("persongroup", np.logical_or.reduce(masks))

    def traffic(self) -> None:
        """Draw vehicles and persons, from far to near."""
        rng = self.rng
        kinds = ["car", "person", "car", "person", *rng.choice(["car", "person", *TRAFFIC], int(rng.integers(1, 5)))]
        grounds = self.horizon + np.sort(rng.uniform(13, self.height - self.horizon - 14, len(kinds)))
        for kind, ground in zip(rng.permutation(kinds), grounds, strict=True):
            left, right = self.road_edges(ground)
            for _ in range(4):
                if kind == "person":
                    x = rng.uniform(max(left - 40, 0), min(right + 40, self.width))
                    label, thing = kind, self.stand(jointed_person(rng, walking=True), x, ground, PERSON_SIZE)
                else:
                    label, scale = TRAFFIC[kind]
                    thing = self.stand(str(kind), rng.uniform(max(left, 0), min(right, self.width)), ground, scale)
                if thing:
                    self.outline(label, thing.mask)
                    break


def draw_street(rng: np.random.Generator, height: int, width: int) -> Street:
    """Draw one picture of a street, seen over the bonnet of a car.

    Args:
        rng: source of every random choice; the same state gives the same picture.
        height: of the picture in pixels; half the width in Cityscapes.
        width: of the picture in pixels.
    """
    painter = _Painter(rng, height, width)
    painter.backdrop()
    painter.ground()
    painter.post()
    if rng.random() < 0.4:
        painter.group()
    painter.traffic()
    bonnet = disc(width / 2, height, 0.55 * width, 0.08 * height)
    painter.area("ego vehicle", bonnet, rng.random(), (0.1, 0.5), (0.1, 0.3))
    return Street(develop(rng, painter.canvas, exposure=(0.75, 1.15), noise=(1, 2)), painter.outlines)
