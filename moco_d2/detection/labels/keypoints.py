"""Keypoints of labels: their values, and the pairs that change places in a mirrored picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moco_d2.detection.labels.fields import numbers, replaced, whole
from moco_d2.detection.labels.files import shown
from moco_d2.detection.labels.sets import Setting, listed, outside

# A word within a name: lEye, L_EYE, "left eye", eye.L, LEye.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+|\d+")
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


def normalised_keypoints(
    record: dict[str, Any], size: tuple[int, int], wanted: int, names: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Return an object with normalised and counted keypoints, and its problem or None.

    Args:
        record: an annotation.
        size: width and height of its image.
        wanted: the detector's number of keypoints.
        names: the names of the keypoints of the object's category.
    """
    if len(names) != wanted:
        return record, Setting(
            f"has a category of {len(names)} keypoints; MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {wanted}"
        )
    given = record.get("keypoints")
    points = [0] * 3 * wanted if given is None else _unseen_at_zero(given)
    try:
        points = numbers(points)
    except ValueError:
        points = []
    if len(points) != 3 * wanted:
        return record, f"has keypoints {shown(given)}; it must be one list of x, y, visibility of {wanted} keypoints"
    for name, x, y, seen in zip(names, points[::3], points[1::3], points[2::3], strict=True):
        if seen not in (0, 1, 2):
            return record, f"has the keypoint {name!r} with visibility {seen!r}; it must be 0, 1 or 2"
        if seen and outside((x, y, x, y), *size):
            return record, (
                f"has the keypoint {name!r} at ({x:g}, {y:g}), outside the image of {size[0]} x {size[1]}; correct it, "
                "or set its visibility to 0"
            )
    try:
        stated = whole(record.get("num_keypoints") or 0)
    except ValueError:
        stated = -1
    if stated < 0:
        return record, f"has num_keypoints {shown(record['num_keypoints'])}; remove it, and they are counted"
    count = sum(seen > 0 for seen in points[2::3])
    return replaced(record, keypoints=points, num_keypoints=count), None


def _unseen_at_zero(points: Any) -> Any:
    """Return keypoints with numbers for points that are not visible; some tools write null, null, 0."""
    if not isinstance(points, list) or None not in points:
        return points
    triples = [points[start : start + 3] for start in range(0, len(points), 3)]
    return [v for t in triples for v in ([0, 0, 0] if t[2:] in ([0], [None]) and None in t[:2] else t)]


def without_keypoints(record: dict[str, Any]) -> dict[str, Any]:
    """Return an object without keypoints that Detectron2 could not read; the detector does not need them."""
    try:
        points = record.get("keypoints")
        if points is None or len(numbers(points)) % 3 == 0:
            whole(record.get("num_keypoints") or 0)
            return replaced(record, **{key: None for key in ("keypoints", "num_keypoints") if record.get(key) is None})
    except ValueError:
        pass
    return replaced(record, keypoints=None, num_keypoints=None)


def category_problem(category: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a category's keypoint names or skeleton, or None."""
    names, bones = category.get("keypoints") or [], category.get("skeleton") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return f"has keypoints {shown(names)}; it must be a list of names"
    if len({*names}) < len(names):
        return f"has two keypoints named {next(name for name in names if names.count(name) > 1)!r}; rename one of them"
    try:
        if all(isinstance(bone, list) and len([whole(end) for end in bone]) == 2 for bone in bones):
            return None
    except (ValueError, TypeError):
        pass
    return f"has skeleton {shown(bones)}; it must be a list of pairs of keypoint numbers, which start at 1"


def keypoint_metadata(
    categories: Sequence[Mapping[str, Any]], mirror: Sequence[tuple[str, str]] | None = None
) -> dict[str, Any]:
    """Return Detectron2's metadata of keypoints, from the first category that has keypoints.

    Args:
        categories: normalised categories.
        mirror: pairs of names that change places in a mirrored picture; None recognises left and right in the names.
    """
    category = next((c for c in categories if c.get("keypoints")), None)
    if category is None:
        return {}
    names = list(category["keypoints"])
    bones = [(whole(a) - 1, whole(b) - 1) for a, b in category.get("skeleton") or ()]
    bones = [(a, b) for a, b in bones if 0 <= min(a, b) <= max(a, b) < len(names)]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": mirror_pairs(names)[0] if mirror is None else list(mirror),
        "keypoint_connection_rules": [(names[a], names[b], (255, 128, 0)) for a, b in bones],
    }


def mirror_problem(names: Sequence[str], mirror: Sequence[tuple[str, str]] | None, flip: str) -> str | None:
    """Return why pictures with these keypoints must not be mirrored, or None.

    Args:
        names: the names of the keypoints.
        mirror: the entry's pairs; None recognises them by their names.
        flip: ``INPUT.RANDOM_FLIP``.
    """
    pairs, halves = mirror_pairs(names)
    if mirror is not None:
        pairs, halves = list(mirror), []
        unknown = [name for pair in mirror for name in pair if name not in names]
        if unknown:
            return f"mirror names {unknown[0]!r}, which is not a keypoint; the keypoints are {listed(names)}"
    if flip == "none":
        return None
    if flip == "vertical" and pairs:
        return "INPUT.RANDOM_FLIP vertical mirrors pictures without exchanging left and right keypoints; set it to none"
    remedy = "add mirror: [[left, right], ...] to the entry, or mirror: [] if no keypoint has a mirror image"
    if halves:
        return (
            f"INPUT.RANDOM_FLIP {flip} mirrors pictures, and the keypoint {halves[0]!r} looks like one of a left and a "
            f"right one, but the other is not certain; {remedy}"
        )
    if not pairs and mirror is None:
        return (
            f"INPUT.RANDOM_FLIP {flip} mirrors pictures, and the names of the keypoints ({listed(names)}) do not tell "
            f"which are left and right; {remedy}"
        )
    return None


def mirror_pairs(names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the pairs (left, right) of keypoints, and the names that look like half of a pair.

    A side is a word of the name (left, L, r, ...), or a part of a word (lefteye, lhip, eyel) if the mirrored name
    exists as well.
    """
    partners = {name: [other for other in dict.fromkeys(_mirrored(name)) if other in names] for name in names}
    sure = {name: found[0] for name, found in partners.items() if len(found) == 1}
    sure = {name: other for name, other in sure.items() if sure.get(other) == name}
    pairs, paired = [], set[str]()
    for name, other in sure.items():
        if name not in paired:
            paired |= {name, other}
            pairs.append((name, other) if _is_left(name, other) else (other, name))
    halves = [name for name in names if name not in sure and (partners[name] or _has_side(name))]
    return pairs, halves


def _mirrored(name: str) -> Iterator[str]:
    """Yield the possible names of a keypoint's mirror image."""
    words = [match for match in _WORD.finditer(name) if match.group().lower() in _SIDES]
    for chosen in [[word] for word in words] + ([words] if len(words) > 1 else []):
        other = name
        for word in reversed(chosen):
            other = other[: word.start()] + _other_side(word.group()) + other[word.end() :]
        yield other
    for side in re.finditer("left|right", name, re.IGNORECASE):
        yield name[: side.start()] + _other_side(side.group()) + name[side.end() :]
    for word in _WORD.finditer(name):
        for at in (word.start(), word.end() - 1):
            if len(word.group()) > 1 and name[at].lower() in "lr":
                yield name[:at] + _other_side(name[at]) + name[at + 1 :]


def _other_side(word: str) -> str:
    other = _SIDES[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def _has_side(name: str) -> bool:
    words = [match.group().lower() for match in _WORD.finditer(name)]
    return any(word in _SIDES or word.startswith(("left", "right")) for word in words)


def _is_left(name: str, other: str) -> bool:
    at = next(index for index, (a, b) in enumerate(zip(name.lower(), other.lower(), strict=False)) if a != b)
    return name[at].lower() == "l"
