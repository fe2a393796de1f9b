"""Shapes of the sample data's objects: an outline for each of twenty kinds, and jointed persons.

All shapes are in a box of side 1 around the origin; coordinates are (x, y), y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

Outline = tuple[np.ndarray, ...]


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Return a rectangle's corners."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def disc(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    """Return the corners of an ellipse around (x, y), or of a circle if ``ry`` is None."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + (ry or rx) * np.sin(angle)], axis=1)


def poly(*points: tuple[float, float]) -> np.ndarray:
    """Return the polygon through these corners."""
    return np.array(points)


def _legs(top: float, *lefts: float) -> Outline:
    return tuple(box(x, top, x + 0.1, 0.44) for x in lefts)


# Each is a union of simple parts.
OUTLINES: dict[str, Outline] = {
    "aeroplane": (
        poly((0, -0.5), (0.08, -0.36), (0.09, 0.3), (0.04, 0.45), (-0.04, 0.45), (-0.09, 0.3), (-0.08, -0.36)),
        poly((0, -0.16), (0.5, 0.12), (0.5, 0.24), (0, 0.12), (-0.5, 0.24), (-0.5, 0.12)),
        poly((0, 0.3), (0.22, 0.42), (0.22, 0.5), (-0.22, 0.5), (-0.22, 0.42)),
    ),
    "bicycle": (
        disc(-0.29, 0.2, 0.21),
        disc(0.29, 0.2, 0.21),
        poly((-0.3, 0.22), (-0.14, -0.18), (0.2, -0.18), (0.04, 0.22)),
        poly((0.14, -0.34), (0.23, -0.34), (0.34, 0.2), (0.24, 0.2)),
        box(-0.22, -0.28, -0.04, -0.16),
    ),
    "bird": (
        disc(0, 0.06, 0.28, 0.17),
        disc(0.27, -0.12, 0.13),
        poly((0.36, -0.2), (0.5, -0.1), (0.36, -0.04)),
        poly((-0.18, 0.02), (-0.5, -0.1), (-0.46, 0.14)),
        poly((-0.14, 0.02), (0.12, 0.02), (-0.18, -0.44)),
    ),
    "boat": (
        poly((-0.5, 0.16), (0.5, 0.16), (0.32, 0.44), (-0.32, 0.44)),
        box(-0.04, -0.5, 0.04, 0.18),
        poly((0.03, -0.46), (0.42, 0.08), (0.03, 0.08)),
        poly((-0.03, -0.34), (-0.03, 0.08), (-0.34, 0.08)),
    ),
    "bottle": (
        box(-0.08, -0.5, 0.08, -0.18),
        poly((-0.08, -0.24), (0.08, -0.24), (0.19, -0.02), (0.19, 0.5), (-0.19, 0.5), (-0.19, -0.02)),
    ),
    "bus": (box(-0.5, -0.3, 0.5, 0.22), disc(-0.28, 0.24, 0.11), disc(0.28, 0.24, 0.11)),
    "car": (
        poly((-0.5, 0.0), (-0.34, -0.02), (-0.2, -0.24), (0.16, -0.24), (0.32, -0.01), (0.5, 0.04), (0.5, 0.18)),
        box(-0.5, 0.0, 0.5, 0.18),
        disc(-0.28, 0.18, 0.12),
        disc(0.29, 0.18, 0.12),
    ),
    "cat": (
        disc(0, 0.1, 0.4, 0.36),
        poly((-0.4, 0.04), (-0.37, -0.5), (-0.06, -0.2)),
        poly((0.4, 0.04), (0.37, -0.5), (0.06, -0.2)),
    ),
    "chair": (box(-0.3, -0.5, -0.18, 0.5), box(-0.3, 0, 0.3, 0.13), box(0.18, 0.02, 0.3, 0.5)),
    "cow": (
        box(-0.36, -0.2, 0.28, 0.16),
        *_legs(0.1, -0.35, -0.2, 0.04, 0.17),
        disc(0.36, -0.18, 0.14, 0.11),
        poly((0.26, -0.24), (0.24, -0.42), (0.38, -0.26)),
    ),
    "diningtable": (box(-0.5, -0.26, 0.5, -0.06), box(-0.42, -0.1, -0.3, 0.32), box(0.3, -0.1, 0.42, 0.32)),
    "dog": (
        disc(-0.04, 0.05, 0.32, 0.15),
        disc(0.3, -0.16, 0.15, 0.13),
        box(0.34, -0.18, 0.5, -0.06),
        *_legs(0.08, -0.3, 0.14),
        poly((-0.3, 0.06), (-0.5, -0.3), (-0.4, -0.32), (-0.22, -0.04)),
    ),
    "horse": (
        disc(-0.08, 0.02, 0.3, 0.15),
        poly((0.06, 0.0), (0.18, -0.48), (0.34, -0.48), (0.24, 0.06)),
        poly((0.2, -0.5), (0.5, -0.32), (0.45, -0.2), (0.24, -0.3)),
        *_legs(0.06, -0.34, -0.2, 0.0, 0.12),
    ),
    "motorbike": (
        disc(-0.3, 0.2, 0.19),
        disc(0.3, 0.2, 0.19),
        poly((-0.44, -0.12), (0.1, -0.16), (0.22, -0.34), (0.32, -0.3), (0.32, 0.14), (-0.2, 0.18)),
    ),
    "person": (
        disc(0, -0.37, 0.12, 0.13),
        poly((-0.23, -0.24), (0.23, -0.24), (0.15, 0.1), (-0.15, 0.1)),
        poly((-0.15, 0.08), (0.0, 0.08), (-0.06, 0.5), (-0.19, 0.5)),
        poly((0.15, 0.08), (0.0, 0.08), (0.06, 0.5), (0.19, 0.5)),
    ),
    "pottedplant": (
        poly((-0.23, 0.1), (0.23, 0.1), (0.14, 0.5), (-0.14, 0.5)),
        disc(0, -0.27, 0.15, 0.23),
        disc(-0.21, -0.08, 0.2, 0.13),
        disc(0.21, -0.08, 0.2, 0.13),
    ),
    "sheep": (
        *(disc(x, y, 0.19) for x, y in ((-0.22, -0.06), (-0.04, -0.16), (0.16, -0.06), (-0.04, 0.08))),
        disc(-0.04, 0.02, 0.34, 0.17),
        disc(0.37, -0.04, 0.12, 0.15),
        *_legs(0.1, -0.24, 0.1),
    ),
    "sofa": (
        box(-0.5, 0.0, 0.5, 0.3),
        box(-0.38, -0.3, 0.38, 0.1),
        box(-0.5, -0.14, -0.36, 0.3),
        box(0.36, -0.14, 0.5, 0.3),
    ),
    "train": (
        poly((-0.27, 0.3), (-0.27, -0.32), (-0.13, -0.5), (0.13, -0.5), (0.27, -0.32), (0.27, 0.3)),
        poly((-0.25, 0.26), (0.25, 0.26), (0.4, 0.5), (-0.4, 0.5)),
    ),
    "tvmonitor": (box(-0.48, -0.4, 0.48, 0.22), box(-0.08, 0.2, 0.08, 0.38), box(-0.26, 0.32, 0.26, 0.42)),
}
KINDS = tuple(OUTLINES)

# COCO's seventeen keypoints in its order: nose, then left and right of each.
PAIRED = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
KEYPOINTS = ("nose", *(f"{side}_{joint}" for joint in PAIRED for side in ("left", "right")))
# Order of the keypoints in a mirrored picture: left and right change places.
FLIPPED = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, len(KEYPOINTS)))]


@dataclass(frozen=True)
class JointedPerson:
    """A person in some pose that faces the viewer, so its left is on the picture's right.

    Attributes:
        parts: its limbs, body and face, from back to front.
        materials: of each part: ``shirt`` (the texture of its kind), ``skin``, ``trousers`` or ``dark``.
        keypoints: (17, 2), in the order of :data:`KEYPOINTS`; each is well inside a part.
    """

    parts: Outline
    materials: tuple[str, ...]
    keypoints: np.ndarray


def _round(centre: np.ndarray, rx: float, ry: float | None = None) -> np.ndarray:
    return disc(centre[0], centre[1], rx, ry)


def _limb(start: np.ndarray, end: np.ndarray, wide: float, narrow: float) -> np.ndarray:
    """Return the outline of a limb between two joints with the radii ``wide`` and ``narrow``."""
    discs = np.concatenate([_round(start, wide), _round(end, narrow)]).astype(np.float32)
    hull: np.ndarray = cv2.convexHull(discs)[:, 0].astype(np.float64)
    return hull


def _step(right: float, down: float) -> np.ndarray:
    return np.array([right, down])


def _towards(angle: float, length: float) -> np.ndarray:
    """Return a step of a given length; angle 0 is straight down, positive angles turn to the picture's right."""
    return _step(length * np.sin(angle), length * np.cos(angle))


def _pose(rng: np.random.Generator, walking: bool) -> dict[str, np.ndarray]:
    """Draw the places of the joints, of ``head`` and of ``neck``."""
    lean = rng.normal(0, 0.03 if walking else 0.15)
    pelvis = _step(0, 0.03)
    neck = pelvis - _towards(lean, 0.28)
    across = _step(np.cos(lean), -np.sin(lean))
    head = neck - _towards(lean + rng.normal(0, 0.08), 0.125)
    at = {"neck": neck, "head": head, "nose": head + _step(rng.uniform(-0.03, 0.03), 0.015)}
    for side, sign in (("left", 1), ("right", -1)):
        raised, bent = (rng.uniform(0.08, 0.35), 0) if walking else (rng.uniform(0.1, 2.7), rng.uniform(-0.9, 1.3))
        spread, kick = (rng.uniform(-0.1, 0.35), 0) if walking else (rng.uniform(-0.05, 0.75), rng.uniform(-0.6, 0.2))
        at[f"{side}_eye"] = at["nose"] + _step(sign * 0.034, -0.035)
        at[f"{side}_ear"] = head + _step(sign * 0.085, 0)
        at[f"{side}_shoulder"] = neck + sign * 0.12 * across + _step(0, 0.03)
        at[f"{side}_elbow"] = at[f"{side}_shoulder"] + _towards(sign * raised + lean, 0.15)
        at[f"{side}_wrist"] = at[f"{side}_elbow"] + _towards(sign * (raised + bent) + lean, 0.13)
        at[f"{side}_hip"] = pelvis + sign * 0.065 * across
        at[f"{side}_knee"] = at[f"{side}_hip"] + _towards(sign * spread, 0.21)
        at[f"{side}_ankle"] = at[f"{side}_knee"] + _towards(sign * (spread + kick), 0.2)
    return at


def jointed_person(rng: np.random.Generator, walking: bool = False) -> JointedPerson:
    """Draw a person. Sleeves end at the elbow and trousers at the knee, so that these joints can be seen.

    Args:
        rng: source of the pose.
        walking: upright with the arms down, as in a street; otherwise any pose up to that of a jumping jack.
    """
    at = _pose(rng, walking)
    legs: list[tuple[np.ndarray, str]] = []
    arms: list[tuple[np.ndarray, str]] = []
    for side, sign in (("left", 1), ("right", -1)):
        shoulder, elbow, wrist, hip, knee, ankle = (at[f"{side}_{joint}"] for joint in PAIRED[2:])
        legs += [(_limb(knee, ankle, 0.042, 0.032), "skin"), (_limb(hip, knee, 0.07, 0.055), "trousers")]
        legs += [(_limb(ankle, ankle + _step(sign * 0.035, 0.015), 0.038, 0.026), "dark")]
        arms += [(_limb(elbow, wrist, 0.036, 0.03), "skin"), (_limb(shoulder, elbow, 0.055, 0.046), "shirt")]
    body = np.stack([at["left_shoulder"], at["right_shoulder"], at["right_hip"], at["left_hip"]])
    body += (body - body.mean(axis=0)) * (0.18, 0.06)
    head = [(_round(at[f"{side}_ear"], 0.028), "skin") for side in ("left", "right")]
    head += [(_limb(at["neck"], at["head"], 0.04, 0.04), "skin"), (_round(at["head"], 0.085, 0.1), "skin")]
    head += [(_round(at[f"{side}_eye"], 0.016), "dark") for side in ("left", "right")]
    head += [(_round(at["nose"], 0.014, 0.02), "trousers")]
    parts, materials = zip(*legs, (body, "shirt"), *arms, *head, strict=True)
    return JointedPerson(parts, materials, np.stack([at[name] for name in KEYPOINTS]))
