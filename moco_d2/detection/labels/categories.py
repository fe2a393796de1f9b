"""Categories of a COCO file: which are the detector's classes, which are left out, and under which ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moco_d2.detection.labels.fields import Ids, known_ids, plain_record, replaced
from moco_d2.detection.labels.files import JsonFile, shown
from moco_d2.detection.labels.keypoints import category_problem, mirror_pairs, mirror_problem
from moco_d2.detection.labels.sets import Entry, Needs, Report, listed
from moco_d2.messages import did_you_mean

Record = dict[str, Any]


@dataclass
class Categories:
    """Normalised categories.

    Attributes:
        plain: in the order of their ids.
        classes: their names.
        ids: all ids of the file.
        new: the file's id -> plain id, of the classes.
        left_out: the file's id -> name, of what the entry leaves out.
        others: the file's id -> name, of what is neither.
        notes: what was left out because no object is of it, and the like, for the log.
    """

    plain: list[Record]
    classes: list[str]
    ids: Ids
    new: dict[Any, int]
    left_out: dict[Any, str]
    others: dict[Any, str]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keypoints(self) -> dict[int, tuple[str, ...]]:
        """The names of keypoints by plain id."""
        return {c["id"]: tuple(c.get("keypoints") or ()) for c in self.plain}

    def problem(self, category: int | str | None, said: Any) -> str | None:
        """Return why no object can be of a category of the file; None if one can, or the category is a problem itself.

        Args:
            category: the id that was found in the file, or None.
            said: what the object says.
        """
        if category in self.new or category in self.left_out:
            return None
        if category is not None and category in self.others:
            name = self.others[category]
            way_out = f"; to leave its objects out, write leave_out: [{name}] into the entry of DATASETS.CUSTOM"
            hint = did_you_mean(name, self.classes) or way_out
            return f"has the unknown class {name!r}: it is not in classes, which are {listed(self.classes)}{hint}"
        if category is not None:
            return None
        plain = {record["id"]: record["name"] for record in self.plain}
        names = {own: plain[new] for own, new in self.new.items()} | self.left_out | self.others
        held = listed([f"{own!r} ({name})" for own, name in names.items()])
        return f"has the unknown class category_id {shown(said)}; categories holds {held}"


def read_categories(file: JsonFile, entry: Entry, needs: Needs, report: Report) -> Categories:
    """Read and check the categories of a COCO file."""
    found: dict[int | str, tuple[int, Record]] = {}
    for index, record in file.records("categories"):
        plain, problem = plain_record("categories", record)
        plain = replaced(
            plain, **{key: None for key in ("supercategory", "keypoints", "skeleton") if not plain.get(key)}
        )
        if not problem and not {"id", "name"} <= plain.keys():
            problem = "needs an id and a name"
        elif not problem and plain["id"] in found:
            problem = "has the id of another category: duplicate id"
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
    notes = [f"category {shown(own)} ({why}) is left out: no object is of it" for own, why in unused.items()]
    names: set[str] = set()
    for own, (index, plain) in found.items():
        if own not in unused and plain["name"] in names:
            file.problem("categories", index, f"has the name {plain['name']!r} of another category: duplicate id")
            del records[own]
        names |= {plain["name"]} if own not in unused else set()
    for own in unused:
        del records[own]
    result = _numbered(records, ids, entry)
    result.notes += notes
    if not result.classes:
        why = "leave_out leaves no class" if result.left_out else "has no categories: write classes into its entry"
        report(f"{file.path}: {why}")
    for name in () if entry.classes else entry.leave_out:
        if name not in names:
            report(
                f"data set {entry.name!r}: leave_out names {name!r}, which {file.path} does not have"
                f"{did_you_mean(name, names)}"
            )
    if needs.keypoints:
        _check_keypoints(result, entry, needs, report)
    return result


def unused_roots(
    records: Mapping[int | str, Record], used: Collection[int | str | None], classes: Sequence[str]
) -> dict[int | str, str]:
    """Return the categories that are there for order only, and why: id -> reason.

    Exports put a root above the classes. No object is of it, and it has the name of a class, or it is the supercategory
    of classes and has none itself.
    """
    names = Counter(record["name"] for record in records.values())
    above = [record.get("supercategory") for record in records.values()]
    parents = {parent for parent in above if isinstance(parent, str)}
    found: dict[int | str, str] = {}
    for roots in (True, False):  # of two unused categories of a name the root goes
        for own, record in records.items():
            name, top = record["name"], str(record.get("supercategory") or "none").lower() == "none"
            if own in found or own in used or top != roots:
                continue
            if names[name] > 1:
                found[own] = f"another one is called {name!r}, too"
                names[name] -= 1
            elif top and name in parents and name not in classes:
                found[own] = f"{name!r}, the supercategory of others"
    return found


def _numbered(records: Mapping[Any, Record], ids: Ids, entry: Entry) -> Categories:
    """Give the classes plain ids: the file's own, if they are numbers in the order of the classes."""
    order = sorted(records, key=lambda own: (isinstance(own, str), own))
    left_out = {own: records[own]["name"] for own in order if records[own]["name"] in entry.leave_out}
    classes = list(entry.classes) or [records[own]["name"] for own in order if own not in left_out]
    kept = [own for own in order if records[own]["name"] in classes]
    others = {own: records[own]["name"] for own in order if own not in left_out and own not in kept}
    if [records[own]["name"] for own in kept] == classes and all(type(own) is int and 0 <= own < 2**31 for own in kept):
        plain = [records[own] for own in kept]
        return Categories(plain, classes, ids, {own: own for own in kept}, left_out, others)
    by_name = {records[own]["name"]: own for own in kept}
    plain = [
        replaced(records[by_name[name]], id=number) if name in by_name else {"id": number, "name": name}
        for number, name in enumerate(classes, 1)
    ]
    new = {by_name[name]: number for number, name in enumerate(classes, 1) if name in by_name}
    return Categories(plain, classes, ids, new, left_out, others)


def _check_keypoints(categories: Categories, entry: Entry, needs: Needs, report: Report) -> None:
    """Report keypoints that cannot be trained: one detector has one list of them."""
    named = [(c["name"], names) for c in categories.plain if (names := categories.keypoints[c["id"]])]
    if not named:
        return  # every object says so
    name, names = named[0]
    for other, theirs in named[1:]:
        if theirs != names:
            report(
                f"data set {entry.name!r}: {name!r} and {other!r} name their keypoints differently ({listed(names)}; "
                f"{listed(theirs)}), and a detector has one list of keypoints"
            )
    problem = mirror_problem(names, entry.mirror, needs.flip if needs.trains else "none")
    if problem:
        report(f"data set {entry.name!r}: {problem}")
    pairs = mirror_pairs(names)[0] if entry.mirror is None else entry.mirror
    if pairs:
        categories.notes.append("mirrored keypoints: " + ", ".join(f"{a} - {b}" for a, b in pairs))
