"""The benchmarks run at a small size and find equal numbers. No test compares speeds."""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import measure, methods, parts
from moco_d2.config import load_cfg

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run ``python -m benchmarks`` in this process; return what it writes."""
    monkeypatch.setenv("MOCO_D2_CACHE", str(tmp_path / "cache"))  # a benchmark sets its own

    def in_this_process(preload: list[str], work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    def run(*words: object) -> dict[str, Any]:
        for module in ("benchmarks.conversion", "benchmarks.scale"):
            if module in sys.modules:
                monkeypatch.setattr(sys.modules[module], "in_new_process", in_this_process)
        monkeypatch.setattr(measure, "in_new_process", in_this_process)  # for those that are imported from now on
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, words), "-o", str(tmp_path / "rows.json")])
        benchmark.main()
        content: dict[str, Any] = json.loads((tmp_path / "rows.json").read_text())
        return content

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


# Detectron2 divides by the number of a class's objects, of which six pictures need not have any.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
def test_eval_compares_every_backend_and_both_voc_metrics(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content, shown = run("eval", "--images", 6, "--detections", 9), capsys.readouterr().out
    assert (content["images"], content["detections"]) == (6, 9)
    problems = {"COCO boxes, 6 x 9": 0, "VOC 2007, 6 x 9": 0, "VOC 2012, 6 x 9": 0}
    for row in content["rows"]:
        assert row["ratio"] == 1 if problems[row["problem"]] == 0 else row["ratio"] > 0  # the reference comes first
        assert row["difference"] < 1e-12
        assert row["by"] in shown
        problems[row["problem"]] += 1
    assert problems["COCO boxes, 6 x 9"] >= 3
    assert problems["VOC 2007, 6 x 9"] == problems["VOC 2012, 6 x 9"] == 2


@pytest.mark.parametrize(
    "name", ["eval", "convert", "step", "feed", "kernels", "methods", "parts", "data", "scale", "startup", "proof"]
)
def test_every_benchmark_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name}")


def test_startup_times_every_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "COMMANDS", ("report",))
    rows = run("startup", "--repeats", 1)["startup"]
    assert [row["what"] for row in rows] == ["import torch", "import moco_d2", "moco-d2 report"]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_size_of_nothing_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="--images is 0; it must be at least 1"):
        run("eval", "--images", 0)


@pytest.mark.slow
def test_convert_compares_with_torch_load(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content, shown = run("convert", "--width", 0.25, "--repeats", 1), capsys.readouterr().out
    assert (content["width"], content["repeats"]) == (0.25, 1)
    works = ("torch.load", "conversion", "conversion, both SHA-256, report", "proof alone")
    assert tuple(row["work"] for row in content["rows"]) == 2 * works
    for row in content["rows"]:
        assert row["seconds"] > 0 and row["ratio"] > 0 and (row["work"] != "torch.load" or row["ratio"] == 1)
        assert row["work"] in shown and row["problem"] in shown
        # What is dropped is never read, in either format.
        assert row["work"] != "conversion" or row["private"] < 0.5


def test_data_compares_every_backend_with_the_authors_loader(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    content, shown = run("data", "--images", 2, "--repeats", 1, "--size", 96), capsys.readouterr().out
    rows = {row["what"]: row["times as fast"] for row in content["loader"]}
    whole = "device: all on the CPU"
    part, reduced = "device: a worker's part", ", reduced decoding"
    assert list(rows) == [
        "the authors' loader",
        "lightly's loader",
        "pil",
        "cv2",
        f"cv2{reduced}",
        part,
        part + reduced,
        whole,
    ]
    assert rows["the authors' loader"] == 1 and all(ratio > 0 for ratio in rows.values())
    parts = [row["what"] for row in content["parts, ms"]]
    assert parts == ["decode", "crop", "brightness", "contrast", "saturation", "hue", "grey", "blur", "flip"]
    for row, sizes in zip(content["the device's part of a batch of 256"], (1, 2, 2), strict=True):
        assert row["index lists: kernels"] < 470 * sizes and row["masks: kernels"] < 500 * sizes, row["what"]
        assert row["masks: GB"] > 2 * row["index lists: GB"], "without the compiler they compute what is not needed"
    apart = {row.pop("what"): row for row in content["difference to PIL, pixel values"]}
    assert list(apart) == ["crop", "crop of a JPEG decoded at a half", *parts[2:], "solarise", "the whole augmentation"]
    assert max(apart["hue"].values()) < 9, "of the same crop and step"
    assert "bottleneck: pil: " in shown


def test_step_compares_with_its_encoders_the_authors_form_lightlys_and_plain_ddp(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--batch", 16, "--size", 32, "--encoder", "resnet18", "--repeats", 2)
    content = run("step", *small, "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size", 20000)
    names = {title: [row["what"] for row in content[title]] for title in ("step", "two processes")}
    one = "one BN group"
    assert names["step"] == [
        "its encoders alone", "ours", "the authors' form", f"ours, {one}", f"lightly's MoCo, {one}",
    ]  # fmt: skip
    assert all(row["images/s in a row"] > 0 for row in content["step"])
    assert names["two processes"] == ["encoders, plain DDP", "ours"]
    textbook, ours = (row["copies"] for row in content["memory"])
    assert textbook > 2.5 > ours, "copies of the logits that are held"
    assert "bottleneck: the encoders" in capsys.readouterr().out and content["machine"]


def test_feed_compares_steps_on_files_with_steps_on_views_that_are_there(run: Run) -> None:
    small = ("--batch", 16, "--size", 32, "--encoder", "resnet18", "--repeats", 2, "--images", 16, "--workers", 0, 1)
    content = run("feed", *small, "--channels-last", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size", 64)
    none, one = content["feed"]
    assert (none["loader processes"], one["loader processes"]) == (0, 1)
    assert none["loader images/s"] > none["training images/s"] > 0, "without a process, the step waits for the loader"
    assert one["of the synthetic rate"] == one["training images/s"] / one["synthetic images/s"]


@pytest.mark.slow
def test_kernels_counts_a_step_of_one_group_and_of_eight(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--batch", 64, "--size", 64, "--encoder", "resnet18", "SSL.ENCODER.ARGS.width", 0.125)
    words = ("--repeats", 2, "--roofline", "SSL.ARGS.queue_size", 64)
    found = run("step", *small[:-2], *words, *small[-2:])["roofline"]
    assert re.fullmatch(r"\S+ GB a step, .* a copy moves .* GB/s; the step runs at \d+% of .*", found)
    one, eight = run("kernels", *small, "SSL.ARGS.queue_size", 64)["step"]
    assert (one["BN groups"], eight["BN groups"]) == (1, 8)
    assert one["operations"] < eight["operations"] and one["GB"] < eight["GB"] < 1.2 * one["GB"]
    assert "| BN groups |" in " ".join(capsys.readouterr().out.split())


def test_methods_compares_with_its_networks_and_moco_v2(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--batch", 16, "--size", 32, "--encoder", "resnet18", "--repeats", 2)
    # The flag takes several names, so another one stands between it and the KEY VALUE pairs.
    content = run("methods", "--methods", "MoCo", *small, "SSL.ENCODER.ARGS.width", 0.125)
    (row,) = content["a step"]
    assert (row["method"], row["recipe"]) == ("MoCo", "moco_v2_R50_200ep")
    assert row["step / its networks"] > 0 and row["step / MoCo v2"] > 0
    assert row["peak MiB"] > row["networks' peak MiB"] > 0, "the logits of the queue"
    assert "| MoCo " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--methods Moko: the methods are .*MoCo"):
        run("methods", "--methods", "Moko", *small)


def test_parts_compares_equal_forms(run: Run) -> None:
    found = run("parts", "--repeats", 2, "--scale", 0.02)
    assert len(found["LARS"]) == 4 and found["LARS"][0]["ratio"] == 1
    assert all(row["seconds"] > 0 for title in found if title.startswith(("NCE", "Sinkhorn")) for row in found[title])
    plain, ours = (work() for work in parts.sinkhorn_works(0.02).values())
    torch.testing.assert_close(plain[-32:], ours, rtol=1e-5, atol=1e-7)
    works = parts.nce_works(4, 0.02)
    (f, *_) = works["plain"].args
    gradients = []
    for work in works.values():
        f.grad = None
        work()
        gradients.append(f.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"--scale is 2\.0; it must be above 0 and at most 1"):
        run("parts", "--scale", 2.0)


def test_a_method_is_measured_under_its_own_recipe_with_patches_and_clusters_that_fit() -> None:
    chosen = methods.recipes(["CPC", "InstDisc", "MoCo", "DeepClusterV2"])
    assert {name.removeprefix("Pretrain/") for name in chosen.values()} == {
        "cpc_R50_300ep", "deepclusterv2_R50_800ep", "instdisc_R50_200ep", "moco_v2_R50_200ep",
    }  # fmt: skip

    def fitting(name: str) -> list[object]:
        small = load_cfg(chosen[name], ["DATA.CROP_SIZE", "64", "SOLVER.IMS_PER_BATCH", "32"])
        return methods.fitting(load_cfg(chosen[name]), small)

    assert fitting("CPC") == ["SSL.ARGS.patch", 16, "SSL.ARGS.stride", 8]
    assert fitting("DeepClusterV2") == ["SSL.ARGS.clusters", 32]
    assert fitting("InstDisc") == []


def test_the_networks_alone_are_called_and_trained_as_in_the_step() -> None:
    words = (
        "SOLVER.IMS_PER_BATCH", "16", "DATA.CROP_SIZE", "32", "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width",
        "0.125", "SSL.ARGS.queue_size", "64", "MODEL.DEVICE", "cpu",
    )  # fmt: skip
    step = methods.Step(load_cfg(methods.REFERENCE, words))
    networks = methods.Networks(step)
    query, key = step.method.encoder_q, step.method.encoder_k
    assert {(module, trained) for module, _, trained in networks.calls} == {(query, True), (key, False)}
    networks.run()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in query.parameters())
    assert all(p.grad is None for p in key.parameters())


def test_scale_finds_every_shard_read_and_the_same_batches(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--files", 300, "--folders", 3, "--shards", 100, "--samples", 1100, "--images", 40, "--repeats", 2)
    content = run("scale", *sizes)
    assert (content["shards"], content["samples"]) == (100, 1100)
    assert [row["what"] for row in content["listing 300 files in 3 folders"]] == [
        "os.walk, sorted", "first listing", "cached listing", "the whole source, from the cached listing",
    ]  # fmt: skip
    opened = content["reading the first image of a shard of 40"]
    assert [row["what"] for row in opened] == ["opened in an earlier run", "never opened"]
    epoch = content["shards of an epoch, and batches 500000 to 500004"]
    assert [row["processes"] for row in epoch] == [1, 8, 32, 64]
    for row in epoch:
        assert row["batches as of one process"] and row["read by none"] == 0
        mean = 100 / row["processes"]
        assert row["each reads at least"] <= mean + 1 and mean <= row["at most"] <= mean + 2
    assert "| at step 1000003 |" in capsys.readouterr().out and content["machine"]
