"""Parts of a labelled set: lists of files as they are published, draws by the seed, and lists that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moco_d2.data.label_lists import as_list, drawn, listed
from moco_d2.data.labelled import LabelledSet


def imagenet(*counts: int) -> LabelledSet:
    """A set of ImageNet's form whose files are never opened; each class has a file of its own name in a subfolder."""
    classes = tuple(f"n{number:08}" for number in range(len(counts)))
    places = [(label, f"{name}_{i}.JPEG" if i else "cover.JPEG")
              for label, name in enumerate(classes) for i in range(counts[label])]  # fmt: skip
    files = [f"/data/imagenet/train/{classes[label]}/{file}" for label, file in places]
    return LabelledSet("imagenet_train", files, torch.tensor([label for label, _ in places]), classes)


def test_a_list_names_files_or_ends_of_paths_in_any_order(tmp_path: Path) -> None:
    pictures, path = imagenet(3, 3), tmp_path / "1percent.txt"
    path.write_bytes(b"n00000001_2.JPEG\r\n\nn00000000/cover.JPEG\n/data/imagenet/train/n00000000/n00000000_1.JPEG")
    part = listed(pictures, path)
    assert part.files == [pictures.files[number] for number in (0, 1, 5)] and part.labels.tolist() == [0, 0, 1]
    path.write_bytes(as_list(part, pictures))
    assert path.read_text() == "n00000000/cover.JPEG\nn00000000/n00000000_1.JPEG\nn00000001/n00000001_2.JPEG\n"
    assert listed(pictures, path).files == part.files

    boxes = np.array([[0, 0, 20, 20.0], [5, 5, 30, 30], [0, 0, 9, 9]])
    objects = LabelledSet("boxes", ["/a/1.jpg", "/a/1.jpg", "/a/2.jpg"], torch.tensor([0, 1, 0]), ("x", "y"), boxes)
    path.write_text("1.jpg")
    part = listed(objects, path)
    assert part.labels.tolist() == [0, 1] and part.boxes is not None and part.boxes.tolist() == boxes[:2].tolist()
    with pytest.raises(ValueError, match="consists of objects, which a list of files cannot name"):
        as_list(part, objects)


@pytest.mark.parametrize(("text", "problem"), [
    ("\n \n", "is empty; it must name a picture a line"),
    ("a.JPEG\nb.JPEG\nc.JPEG\nd.JPEG\nn00000000_1.JPEG",
     "names 4 pictures that are not in imagenet_train: a.JPEG, b.JPEG, c.JPEG and 1 more; take the list"),
    ("cover.JPEG", "has 1 names that stand for several files of imagenet_train: cover.JPEG; write more of their paths"),
    ("n00000000_1.JPEG\nn00000000/n00000000_1.JPEG\nn00000001_1.JPEG", "names 1 pictures more than once: /data/"),
    ("n00000000_1.JPEG\nn00000000_1.JPEG\nn00000001_1.JPEG", "names 1 pictures more than once: /data/"),
    ("n00000000_1.JPEG", "has no picture of 1 of the 3 classes: n00000001; a classifier needs some"),
    ("\0\udcff", "cannot be read"),
])  # fmt: skip
def test_lists_that_do_not_fit(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as refused:
        listed(imagenet(2, 2, 0), path)  # the third class has no pictures in the set, either
    assert problem in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="cannot be read"):
        listed(imagenet(2), tmp_path / "missing.txt")


def test_a_draw_has_as_many_of_each_class_and_grows_with_the_percentage() -> None:
    pictures = imagenet(100, 100, 3, 197)
    small, large, other = drawn(pictures, 1, 5), drawn(pictures, 10, 5), drawn(pictures, 10, 6)
    assert torch.bincount(small.labels).tolist() == [1, 1, 1, 1]
    assert torch.bincount(large.labels).tolist() == torch.bincount(other.labels).tolist() == [10, 10, 3, 10]
    assert set(small.files) < set(large.files) != set(other.files)
    assert drawn(pictures, 10, 5).files == large.files == sorted(large.files, key=pictures.files.index)
    for percent in (0, 101, float("nan")):
        with pytest.raises(ValueError, match="it must be above 0 and at most 100"):
            drawn(pictures, percent, 5)
