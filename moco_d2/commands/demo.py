"""Run the whole pipeline on sample pictures: pretrain, convert, fine-tune, compare.

    moco-d2 demo                      # quarter-width ResNet-18, minutes on two CPU cores
    moco-d2 demo --full               # ResNet-50 at full width: the same, much slower

Each stage is the command that a lab would type, with a config from configs/quick_schedules (the shipped configs with
smaller numbers). Logs, checkpoints, the table, the pictures and a report page stay in the output folder.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moco_d2.commands import cli

FULL_WIDTH = {
    "pretrain": ["SSL.ENCODER.ARGS.width", "1.0"],
    "detect": [
        "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256",
        "MODEL.RESNETS.WIDTH_PER_GROUP", "64",
    ],
}  # fmt: skip
PRETRAIN = "quick_schedules/moco_v2_R{}_quick"
DETECTORS = {
    "VOC C4": "quick_schedules/faster_rcnn_R_{}_C4_quick",
    "COCO FPN": "quick_schedules/mask_rcnn_R_{}_FPN_quick",
}
INITS = ("MoCo", "random")


class Demo:
    """Runs stages one after the other, each in its own process with its own log."""

    def __init__(self, output: Path, full: bool, steps: int | None) -> None:
        # Set before Detectron2 is imported, which reads it then; the stages inherit it.
        os.environ["DETECTRON2_DATASETS"] = str(output / "datasets")
        from moco_d2.io import files

        self.output = output
        self.depth = 50 if full else 18
        self.pretrain_options = FULL_WIDTH["pretrain"] if full else []
        self.detect_options = FULL_WIDTH["detect"] if full else []
        if steps is not None:
            few = ["SOLVER.EPOCHS", "0", "SOLVER.MAX_ITER", str(steps), "SSL.MONITOR.PICTURES", "200"]
            self.pretrain_options = [*self.pretrain_options, *few]
            short = ["SOLVER.MAX_ITER", str(steps), "SOLVER.STEPS", "()", "TEST.PRECISE_BN.NUM_ITER", "1"]
            self.detect_options = [*self.detect_options, *short]
        self.began = time.monotonic()
        # The stages inherit the lock, and keep it if this process is killed.
        self.lock = files.fresh_folder(output, content(), "--output")
        files.claim(output / "logs", ["*.log"], "--output")

    def stage(self, title: str, *command: str | Path, threads: int = 0) -> None:
        """Run one command and show its progress; if it fails, end with its exit code and name its log."""
        self.stages({title: command}, threads)

    def stages(self, commands: Mapping[str, Sequence[str | Path]], threads: int = 0) -> None:
        """Run commands, by title, at the same time.

        Args:
            commands: the words of each.
            threads: for each of them, at most; 0 for the default.
        """
        jobs = []
        for number, (title, command) in enumerate(commands.items(), 1):
            words = [str(word) for word in command]
            log = self.output / "logs" / f"{title.replace(' ', '_').replace(',', '')}.log"
            mark = f"    ({number}) " if len(commands) > 1 else "    "
            print(f"\n[{self._clock()}] {mark.strip()} {title}".replace("  ", " "))
            print(f"  $ moco-d2 {shlex.join(words)}", flush=True)
            jobs.append(cli.Followed(["-m", "moco_d2", *words], log, mark))
        shown = cli.PROGRESS if "OUTPUT_DIR" in words else re.compile(r".*\S")
        environment = dict(os.environ)
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        codes = cli.follow_all(jobs, shown, pass_fds=[self.lock], env=environment)
        for title, job, code in zip(commands, jobs, codes, strict=True):
            if code:
                cli.fail(f"stage {title!r} failed with code {code}; its log is {job.log}", code if code > 0 else 1)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes:02d}:{seconds:02d}"

    def run(self) -> None:
        """Run everything and print the table."""
        out, cores = self.output, os.cpu_count() or 1
        self.stage("sample pictures", "samples", out / "datasets")
        self.stage(
            "pretrain MoCo v2", "pretrain", "--config-file", PRETRAIN.format(self.depth),
            "OUTPUT_DIR", out / "pretrain", *self.pretrain_options,
            # Its loader is busy all the time. With a thread for each core, loader and step hinder each other.
            threads=max(1, cores - 1),
        )  # fmt: skip
        self.stage("convert and prove", "convert", out / "pretrain/backbone.pth", out / "moco.pth")
        for name, config in DETECTORS.items():
            runs: dict[str, list[str | Path]] = {
                f"fine-tune {name} from {init}": [
                    "train", "--config-file", config.format(self.depth), "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR",
                    self.run_folder(name, init), *self.detect_options,
                ]
                for init, weights in zip(INITS, (out / "moco.pth", ""), strict=True)
            }  # fmt: skip
            # So small networks gain little from a second thread, and two trainings at a time gain all of a second core.
            self.stages(runs, threads=max(1, cores // len(runs)))
        self.report()

    def run_folder(self, name: str, init: str) -> Path:
        """Return the folder of a fine-tuning run."""
        return self.output / run_name(name, init)

    def report(self) -> None:
        """Write the table, the pictures and the report page."""
        from moco_d2.config import load_cfg
        from moco_d2.io.files import atomic_write
        from moco_d2.reports import overview, pictures, report

        out = self.output
        table = self.table()
        with atomic_write(out / "table.md") as file:
            file.write(table.encode() + b"\n")
        pictures.draw_pretraining_curve(out / "pretrain", out / "pretraining.png")
        pictures.draw_view_pairs(load_cfg(out / "pretrain" / "config.yaml"), out / "views.png")
        for name in DETECTORS:
            folders = {f"from {init}": self.run_folder(name, init) for init in INITS}
            pictures.draw_detections(folders, out / f"detections_{name.split()[0]}.png")
        overview.draw_overview(out / "pretrain", folders, out / "overview.png")
        runs = [self.run_folder(name, init) for name in DETECTORS for init in INITS]
        report.write_report([out / "pretrain", *runs], out / "report")
        print(f"\n[{self._clock()}] done\n\n{table}\n")
        print("kNN: held-out pictures whose nearest neighbours tell their kind (chance: 5 %). AP: one short run each;")
        print("docs/results.md has means over seeds, and says which differences hold.")
        print(f"The page report/report.html, pictures (*.png), logs and checkpoints are in {out}")

    def table(self) -> str:
        """Return the results of both initialisations in Markdown, a row each: kNN before and after pretraining, AP."""
        from tabulate import tabulate

        from moco_d2.reports.records import read_scalars
        from moco_d2.reports.run import read_run

        key = "monitor/knn_top1"
        probes = [record[key] for record in read_scalars(self.output / "pretrain") if key in record]
        rows = []
        for init, knn in zip(INITS, (probes[-1], probes[0]), strict=True):
            row: dict[str, Any] = {"pre-train": init, "kNN %": knn}
            for name in DETECTORS:
                (metrics,) = read_run(self.run_folder(name, init)).result["metrics"].values()
                row |= {f"{name} AP": metrics["bbox"]["AP"], f"{name} AP50": metrics["bbox"]["AP50"]}
                row |= {f"{name} mask AP": metrics["segm"]["AP"]} if "segm" in metrics else {}
            rows.append(row)
        text: str = tabulate(rows, "keys", "pipe", floatfmt=".2f", missingval="-")
        return text


def run_name(name: str, init: str) -> str:
    """Return the name of the folder of a fine-tuning run."""
    return f"{name}_{init}".replace(" ", "_")


def content() -> list[str]:
    """Return the names of everything that the demo writes; a folder that contains anything else is not emptied."""
    runs = [run_name(name, init) for name in DETECTORS for init in INITS]
    pictures = [f"{name}.png" for name in ("pretraining", "views", "overview")]
    pictures += [f"detections_{name.split()[0]}.png" for name in DETECTORS]
    return ["datasets", "pretrain", "moco.pth", "moco.yaml", "logs", "table.md", "report", *pictures, *runs]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = cli.new_parser("demo", __doc__)
    where = "a new folder, or that of an earlier demo, which is emptied (default: %(default)s)"
    parser.add_argument("--output", type=cli.path, default=Path("output/demo"), help=where)
    parser.add_argument("--steps", type=int, help="iterations of each training, to try the pipeline itself")
    parser.add_argument("--full", action="store_true", help="full-width ResNet-50 instead of quarter width")
    args = parser.parse_args(argv)
    with cli.stop_on_signals("a new demo begins anew; to go on with a training only, add --resume to its command"):
        Demo(args.output.resolve(), args.full, args.steps).run()
