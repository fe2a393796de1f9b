"""Categories of a COCO file: which of them are the detector's classes, which are left out, and their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moco_d2.detection.labels.fields import Ids, known_ids, normalised, replaced
from moco_d2.detection.labels.files import JsonFile, shown
from moco_d2.detection.labels.keypoints import category_problem, mirror_pairs, mirror_problem
from moco_d2.detection.labels.sets import Entry, Needs, Report, listed
from moco_d2.messages import did_you_mean

Record = dict[str, Any]


@dataclass
class Categories:
    """Normalised categories.

    Attributes:
        records: the detector's classes, in the order of its outputs.
        classes: their names.
        ids: all ids of the file.
        new: id in the file -> normalised id, of each class.
        left_out: id in the file -> name, of each category that ``leave_out`` names.
        others: id in the file -> name, of the remaining categories.
        notes: what was left out or recognised, for the log.
    """

    records: list[Record]
    classes: list[str]
    ids: Ids
    new: dict[Any, int]
    left_out: dict[Any, str]
    others: dict[Any, str]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keypoints(self) -> dict[int, tuple[str, ...]]:
        """The names of each class's keypoints, by normalised id."""
        return {c["id"]: tuple(c.get("keypoints") or ()) for c in self.records}

    def problem(self, category: int | str | None, reference: Any) -> str | None:
        """Return why no object can be of a category; None if one can, or if the category itself was reported.

        Args:
            category: the category's id in the file, or None if there is none.
            reference: the object's ``category_id``.
        """
        if category in self.new or category in self.left_out:
            return None
        if category is not None and category in self.others:
            name = self.others[category]
            way_out = f"; to ignore its objects add leave_out: [{name}] to the entry of DATASETS.CUSTOM"
            hint = did_you_mean(name, self.classes) or way_out
            return f"has the unknown class {name!r}; the classes are {listed(self.classes)}{hint}"
        if category is not None:
            return None
        by_id = {record["id"]: record["name"] for record in self.records}
        names = {own: by_id[new] for own, new in self.new.items()} | self.left_out | self.others
        known = listed([f"{own!r} ({name})" for own, name in names.items()])
        return f"has the unknown category_id {shown(reference)}; the categories are {known}"


def read_categories(file: JsonFile, entry: Entry, needs: Needs, report: Report) -> Categories:
    """Read and check the categories of a COCO file."""
    found: dict[int | str, tuple[int, Record]] = {}
    for index, record in file.records("categories"):
        plain, problem = normalised("categories", record)
        dropped = [key for key in ("supercategory", "keypoints", "skeleton") if not plain.get(key)]
        if not isinstance(plain.get("supercategory"), str):  # evaluators accept text only
            dropped.append("supercategory")
        plain = replaced(plain, **dict.fromkeys(dropped))
        if not problem and not {"id", "name"} <= plain.keys():
            problem = "needs an id and a name"
        elif not problem and plain["id"] in found:
            problem = "has the id of another category; give it its own"
        elif not problem and category_problem(plain):
            problem = category_problem(plain) if needs.keypoints else None
            plain = replaced(plain, keypoints=None, skeleton=None)
        if problem:
            file.problem("categories", index, problem)
        else:
            found[plain["id"]] = index, plain
    ids = Ids(known_ids(file.values("categories", "id")))
    used = {ids.find(reference) for reference in known_ids(file.values("annotations", "category_id"))}
    records = {own: plain for own, (_, plain) in found.items()}
    unused = unused_roots(records, used, entry.classes)
    notes = [f"category {shown(own)} ({why}) is left out, because it has no objects" for own, why in unused.items()]
    names: set[str] = set()
    for own, (index, plain) in found.items():
        if own not in unused and plain["name"] in names:
            file.problem("categories", index, f"has the name {plain['name']!r} of another category; rename one of them")
            del records[own]
        names |= {plain["name"]} if own not in unused else set()
    for own in unused:
        del records[own]
    result = _numbered(records, ids, entry)
    result.notes += notes
    if not result.classes:
        why = "leave_out names every class; keep at least one" if result.left_out else "there are no categories"
        report(f"{file.path}: {why}" + "; add classes to the entry of DATASETS.CUSTOM" * (not result.left_out))
    for name in () if entry.classes else entry.leave_out:
        if name not in names:
            report(
                f"data set {entry.name!r}: leave_out names {name!r}, which is not a category of {file.path}"
                f"{did_you_mean(name, names)}"
            )
    if needs.keypoints:
        _check_keypoints(result, entry, needs, report)
    return result


def unused_roots(
    records: Mapping[int | str, Record], used: Collection[int | str | None], classes: Sequence[str]
) -> dict[int | str, str]:
    """Return the categories that only group others: id -> reason.

    Some tools export a root above the classes. It has no objects, and either has the name of a class, or is the
    supercategory of classes and has no supercategory itself.
    """
    names = Counter(record["name"] for record in records.values())
    parents = {record["supercategory"] for record in records.values() if "supercategory" in record}
    found: dict[int | str, str] = {}
    for roots in (True, False):  # Of two unused categories with one name the root is left out.
        for own, record in records.items():
            name, top = record["name"], record.get("supercategory", "none").lower() == "none"
            if own in found or own in used or top != roots:
                continue
            if names[name] > 1:
                found[own] = f"another one is also called {name!r}"
                names[name] -= 1
            elif top and name in parents and name not in classes:
                found[own] = f"{name!r}, the supercategory of others"
    return found


def _numbered(records: Mapping[Any, Record], ids: Ids, entry: Entry) -> Categories:
    """Give the classes normalised ids: those of the file, if they are numbers in the order of the classes."""
    order = sorted(records, key=lambda own: (isinstance(own, str), own))
    left_out = {own: records[own]["name"] for own in order if records[own]["name"] in entry.leave_out}
    classes = list(entry.classes) or [records[own]["name"] for own in order if own not in left_out]
    kept = [own for own in order if records[own]["name"] in classes]
    others = {own: records[own]["name"] for own in order if own not in left_out and own not in kept}
    if [records[own]["name"] for own in kept] == classes and all(type(own) is int and 0 <= own < 2**31 for own in kept):
        same = [records[own] for own in kept]
        return Categories(same, classes, ids, {own: own for own in kept}, left_out, others)
    by_name = {records[own]["name"]: own for own in kept}
    numbered = [
        replaced(records[by_name[name]], id=number) if name in by_name else {"id": number, "name": name}
        for number, name in enumerate(classes, 1)
    ]
    new = {by_name[name]: number for number, name in enumerate(classes, 1) if name in by_name}
    return Categories(numbered, classes, ids, new, left_out, others)


def _check_keypoints(categories: Categories, entry: Entry, needs: Needs, report: Report) -> None:
    """Report keypoints that cannot be trained: a detector has one list of keypoints for all classes."""
    named = [(c["name"], names) for c in categories.records if (names := categories.keypoints[c["id"]])]
    if not named:
        return  # reported for each object
    name, names = named[0]
    for other, theirs in named[1:]:
        if theirs != names:
            report(
                f"data set {entry.name!r}: {name!r} has the keypoints {listed(names)}, and {other!r} has "
                f"{listed(theirs)}; they must be the same for all classes"
            )
    problem = mirror_problem(names, entry.mirror, needs.flip if needs.trains else "none")
    if problem:
        report(f"data set {entry.name!r}: {problem}")
    pairs = mirror_pairs(names)[0] if entry.mirror is None else entry.mirror
    if pairs:
        categories.notes.append("mirrored keypoints: " + ", ".join(f"{a} - {b}" for a, b in pairs))
