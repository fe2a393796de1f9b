"""Reports of results: a short table for the screen, and a full report of many runs.

The full report is Markdown, CSV, LaTeX and one self-contained HTML page. :mod:`moco_d2.reports.summary` computes the
figures of detectors, :mod:`moco_d2.reports.pretraining` those of backbones; this module formats them.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from tabulate import tabulate

import moco_d2
from moco_d2.io import files
from moco_d2.model_zoo import Published
from moco_d2.reports import curves, summary
from moco_d2.reports.content import Content, provenance, read
from moco_d2.reports.pretraining import Backbones, Pretraining
from moco_d2.reports.run import read_run
from moco_d2.reports.summary import Difference, Row, Table, beyond_noise, heading

logger = logging.getLogger(__name__)

COLUMNS = ("pre-train", "protocol", "test set", "AP", "AP50", "AP75", "mask AP", "iterations")
FLAG = "⚑"


def rows(init: str, result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a run's rows of the table, one per test set, as ``COLUMNS``; a metric without a value is a dash."""

    def show(metrics: Mapping[str, Any], task: str, name: str) -> str:
        value = (metrics or {}).get(task, {}).get(name)
        return "-" if value is None else f"{value:.2f}"

    return [
        (
            init,
            result["protocol"] or "-",
            test_set,
            *(show(metrics, "bbox", name) for name in ("AP", "AP50", "AP75")),
            show(metrics, "segm", "AP"),
            str(result.get("iterations", "-")),
        )
        for test_set, metrics in result["metrics"].items()
    ]


def table(runs: list[tuple[str, str | os.PathLike[str]]]) -> str:
    """Return a Markdown table of finished runs.

    Args:
        runs: the initialisation of each run, in words, and its folder.

    Raises:
        ValueError: a run has no results.
    """
    return _markdown_table(COLUMNS, [row for init, folder in runs for row in rows(init, read_run(folder).result)])


def write_report(
    paths: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str], labels: Sequence[str] = ()
) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``report.tex``, ``report.csv`` and ``runs.csv``.

    Args:
        paths: folders of runs, or folders above them.
        folder: of the report.
        labels: two initialisations to compare class by class; see :func:`moco_d2.reports.summary.compared`.

    Returns:
        The files of the report.

    Raises:
        ValueError: a path contains no run, a label is not among the runs, or the folder has files of these names that
            this function did not write.
    """
    content = read(paths, labels)
    for problem in content.left_out:
        logger.warning("left out: %s", problem)
    known = sorted({row.label for table in content.tables for row in table.rows})
    for label in labels:
        if label not in known:
            raise ValueError(f"no run was initialised from {label!r}; the runs are {', '.join(known)}")
    texts = {
        "report.md": markdown(content),
        "report.html": html(content),
        "report.tex": latex(content),
        "report.csv": _csv([*_probe_records(content.backbones), *_cell_records(content.tables)]),
        "runs.csv": _csv(content.origins()),
    }
    files.claim(folder, list(texts), "--output")
    for name, text in texts.items():
        with files.one_line(folder, "--output"), files.atomic_write(Path(folder) / name) as file:
            file.write(text.encode())
    return [Path(folder) / name for name in texts]


def markdown(content: Content) -> str:
    """Return the report as Markdown."""
    parts = ["# Results", *([_legend(content.tables)] if content.tables else [])]
    if content.backbones:
        parts += ["## Pretraining", BACKBONE_LEGEND, _markdown_table(*backbone_lines(content.backbones))]
    for table in content.tables:
        parts += [f"## {table.name} on {table.test_set}", "\n".join(f"* {line}" for line in about(table))]
        parts.append(_markdown_table(*result_lines(table)))
        if table.differences:
            parts.append(_markdown_table(*difference_lines(table)))
        if table.config:
            lines = "\n".join(f"    {key}: {value}" for key, value in table.config.items())
            parts.append(f"<details><summary>{CONFIG}</summary>\n\n{lines}\n\n</details>")
        pair = summary.compared(table, content.labels)
        for metric, entries in summary.per_class(*pair).items() if pair else ():
            first, second = (row.label for row in pair or ())
            body = [(name, f"{a}", f"{b}", signed(a.mean - b.mean)) for name, a, b in entries]
            head = (f"{heading(metric)} of", first, second, "difference")
            parts.append(f"<details><summary>{heading(metric)} by class</summary>\n\n{_markdown_table(head, body)}")
            parts[-1] += "\n\n</details>"
    records = content.origins()
    keys = list(dict.fromkeys(key for record in records for key in record))
    # Values that all runs share are listed once, below the table: they are many and long.
    own = [key for key in keys if key != "command" and (key == "folder" or len({r.get(key) for r in records}) > 1)]
    shared = [key for key in keys if key not in (*own, "command") and records[0][key]]
    parts += ["## Origin of the figures", _markdown_table(own, [[r.get(key, "") for key in own] for r in records])]
    if shared:
        parts += ["All runs:", "\n".join(f"* {key}: {records[0][key]}" for key in shared)]
    if commands := [record["command"] for record in records if record.get("command")]:
        parts += ["Commands:", "\n".join(f"    {command}" for command in commands)]
    if content.left_out:
        parts += [f"{len(content.left_out)} left out:", "\n".join(f"* {problem}" for problem in content.left_out)]
    return "\n\n".join(parts) + "\n"


def latex(content: Content) -> str:
    """Return the report's tables as LaTeX, for the package booktabs."""
    lines = ["% \\usepackage{booktabs}"]
    if content.backbones:
        head, body = backbone_lines(content.backbones)
        lines += _latex_table("pretraining", head, body, len(content.backbones.columns))
    for table in content.tables:
        about = f"{table.name} on {table.test_set}; {table.variant or 'the protocol as it is shipped'}"
        for head, body in (result_lines(table), difference_lines(table)):
            if body:
                lines += _latex_table(about, head, body, len(table.columns))
    return "\n".join(lines) + "\n"


def _latex_table(about: str, head: Sequence[str], body: Sequence[Sequence[str]], figures: int) -> list[str]:
    rows = [" & ".join(map(_latex_text, line)) + r" \\" for line in (head, *body)]
    return [
        "", f"% {about}", f"\\begin{{tabular}}{{{'l' * (len(head) - figures)}{'r' * figures}}}",
        r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


def html(content: Content) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text())
    return template.render(
        tables=content.tables,
        runs=content.runs,
        pretrainings=content.pretrainings,
        probes=content.probes,
        backbones=content.backbones,
        backbone_lines=backbone_lines,
        backbone_legend=BACKBONE_LEGEND,
        pretraining_curves=_pretraining_curves,
        left_out=content.left_out,
        anchors={run.file: f"run-{number}" for number, run in enumerate(content.runs, start=1)},
        pairs=[summary.compared(table, content.labels) for table in content.tables],
        facts_about=_facts_about,
        warnings_about=_warnings_about,
        beyond_noise=beyond_noise,
        config_words=CONFIG,
        heading=heading,
        published_cell=published_cell,
        signed=signed,
        learning_curves=lambda table: [Markup(drawing) for drawing in curves.learning_curves(table)],
        fraction_curves=lambda table: Markup(curves.fraction_curves(table)),
        per_class=summary.per_class,
        provenance=provenance,
        other_origins=content.origins()[: -len(content.runs) or None],
        legend=_legend(content.tables),
        flag=FLAG,
        version=moco_d2.__version__,
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    )


def _pretraining_curves(runs: Sequence[Pretraining]) -> list[Markup]:
    """Draw the curves of the runs, if there are any."""
    if not runs:
        return []
    from moco_d2.reports import panels  # builds each run's method; a report of detectors need not load the engine

    return [Markup(drawing) for drawing in panels.drawings(runs)]


def backbone_lines(backbones: Backbones) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of the table of backbones: our rows, and below those of a recipe its published row.

    A modified or unfinished recipe has none.
    """
    head = ["pretraining", "recipe", "epochs", "loss", "monitor kNN"]
    head += [column.heading for column in backbones.columns.values()]
    body = []
    last = {row.init: row for row in backbones.rows}
    for row in backbones.rows:
        body.append([row.label, row.recipe or "-", *row.progress, *map(row.cell, backbones.columns)])
        published = backbones.published(row)
        if published and last[row.init] is row:
            cells = [
                published_cell(published[key], column.metric) if key in published else "-"
                for key, column in backbones.columns.items()
            ]
            name = next(iter(published.values())).label
            body.append([f"{name}, published", row.recipe or "-", "-", "-", "-", *cells])
    return head, body


def about(table: Table) -> list[str]:
    """Return what a reader must know about a table, a sentence per line."""
    return [*_facts_about(table), *_warnings_about(table)]


def _facts_about(table: Table) -> list[str]:
    """Return what a table's figures are: the protocol, the pictures, and the origin of the weights."""
    files = dict.fromkeys(
        run.trial["config_file"] for row in table.rows for run in row.runs if "config_file" in run.trial
    )
    if not table.protocol:
        lines = ["a protocol of your own" + (f", config {' and '.join(files)}" if files else "")]
    elif table.comparable:
        lines = [f"config {table.protocol.config}; paper row: {table.protocol.paper}; {table.protocol.evidence}"]
    else:
        lines = [f"departs from config {table.protocol.config}"]
    if table.pictures:
        lines.append(table.pictures)
    origins = {row.label: row.origin for row in table.rows if row.origin}
    return [*lines, *(f"{label}: {origin}" for label, origin in origins.items())]


def _warnings_about(table: Table) -> list[str]:
    lines = [table.variant] if table.variant else []
    if table.protocol and not table.comparable:
        lines.append("not the protocol as shipped: not to be compared with its published figures")
    return [*lines, *table.notes]


def result_lines(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return a table's head, and its lines: our rows, then the published rows."""
    parts = ["labels"] * (table.percents != [100])
    head = ["pre-train", *parts, *map(heading, table.columns)]
    body = [
        [row.label, *[f"{row.percent:g}%"] * len(parts), *(str(row.cells.get(m, "-")) for m in table.columns)]
        for row in table.rows
    ]
    for row in table.published:
        cells = (published_cell(row, metric) for metric in table.columns)
        body.append([f"{row.label}, published", *["100%"] * len(parts), *cells])
    return head, body


def published_cell(row: Published, metric: str) -> str:
    """Return a published figure as printed, with its standard deviation (if known) and number of trials."""
    if metric not in row.metrics:
        return "-"
    std = f" ± {row.std[metric]}" if metric in row.std else ""
    return f"{row.metrics[metric]}{std} ({row.trials})"


def signed(delta: float) -> str:
    """Return a difference with its sign; zero is never negative."""
    return f"{round(delta, 2) + 0.0:+.2f}"


def difference_lines(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of the table of differences."""
    head = ["pre-train", "minus", *map(heading, table.columns)]
    return head, [
        [_name(table, item.row), item.against, *(_delta(item, metric) for metric in table.columns)]
        for item in table.differences
    ]


CONFIG = "The config: keys that differ from Detectron2's and this project's defaults"
BACKBONE_LEGEND = (
    "A row is a backbone: of a pretraining run as it is now, of an earlier checkpoint of it, or of another file. "
    "Probes: top-1 in percent, a classifier's after the last epoch (papers print the best one). AP: on all labels. "
    "Mean ± sample standard deviation (number of results). Only complete, unmodified recipes and protocols have "
    "published figures."
)


def _legend(tables: Sequence[Table]) -> str:
    """Return how the tables of detectors are read."""
    published = (
        "Published figures are the papers' own. "
        f"{FLAG} marks a difference from the published row of more than {summary.FLAG_STD} published "
        "standard deviations. "
    )
    return (
        "Mean ± sample standard deviation (number of runs), in percent. "
        + published * any(table.published for table in tables)
        + "On the page, a colour marks a difference beyond the noise of both means (Welch's t-test at 5 %; none for a "
        "single run). A table has the runs of one protocol, in one variant."
    )


def _name(table: Table, row: Row) -> str:
    return row.label if table.percents == [100] else f"{row.label}, {row.percent:g}%"


def _delta(item: Difference, metric: str) -> str:
    if metric not in item.deltas:
        return "-"
    return signed(item.deltas[metric]) + f" {FLAG}" * (metric in item.flags)


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    # disable_numparse: tabulate would drop trailing zeros.
    return str(tabulate(body, head, tablefmt="github", disable_numparse=True, stralign="left"))


def _latex_text(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", FLAG: r"$\dagger$", "~": r"\textasciitilde{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "_%&#$" else letter) for letter in text)


def _cell_records(tables: Sequence[Table]) -> Iterator[dict[str, str]]:
    """Yield a record for each figure, with everything that is known about it."""
    for table in tables:
        for row in table.rows:
            for metric, cell in row.cells.items():
                record = {
                    "protocol": table.name, "test set": table.test_set, "variant": table.variant,
                    "pre-train": row.label, "labels percent": f"{row.percent:g}", "metric": metric,
                    "mean": f"{cell.mean:.4f}", "std": "" if cell.std is None else f"{cell.std:.4f}", "n": str(cell.n),
                    "minus published": "", "flag": "", "minus supervised": "", "minus random": "",
                    "seeds": " ".join(str(run.result.get("seed", "")) for run in row.runs),
                    "folders": " ".join(str(run.folder) for run in row.runs),
                }  # fmt: skip
                for item in table.differences:
                    if item.row is row and metric in item.deltas:
                        against = "published" if item.against.endswith("published") else item.against.split(",")[0]
                        record[f"minus {against}"] = f"{item.deltas[metric]:+.4f}"
                        record["flag"] += FLAG * (metric in item.flags)
                yield record


def _probe_records(backbones: Backbones | None) -> Iterator[dict[str, str]]:
    """Yield a record for each accuracy of a probe; the APs have records of their own."""
    for row in backbones.rows if backbones else ():
        for key, values in row.values.items():
            column = backbones.columns[key] if backbones else None
            if column and column.metric == "top1":
                cell = summary.Cell.of(values)
                yield {
                    "protocol": column.long, "pre-train": row.label, "recipe": row.recipe, "metric": column.metric,
                    "mean": f"{cell.mean:.4f}", "std": "" if cell.std is None else f"{cell.std:.4f}", "n": str(cell.n),
                }  # fmt: skip


def _csv(records: Iterable[Mapping[str, str]]) -> str:
    """Return records as CSV; a key that a record does not have is an empty cell."""
    listed = list(records)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for r in listed for key in r)), "", lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return file.getvalue()
