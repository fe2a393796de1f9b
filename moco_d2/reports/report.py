"""Reports of fine-tuning results: a short table for the screen, and a full report of many runs.

The full report is Markdown, CSV, LaTeX and one self-contained HTML page. :mod:`moco_d2.reports.summary` computes the
figures; this module formats them.
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
from moco_d2.reports.summary import Difference, Row, Run, Table, heading

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
    return _markdown_table(
        COLUMNS, [row for init, folder in runs for row in rows(init, summary.read_run(folder).result)]
    )


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
        ValueError: a path contains no finished run, a label is not among the runs, or the folder has files of these
            names that this function did not write.
    """
    left_out: list[str] = []
    runs = summary.find_runs(paths, left_out.append)
    for problem in left_out:
        logger.warning("left out: %s", problem)
    tables = summary.build_tables(runs)
    known = sorted({row.label for table in tables for row in table.rows})
    for label in labels:
        if label not in known:
            raise ValueError(f"no run was initialised from {label!r}; the runs are {', '.join(known)}")
    texts = {
        "report.md": markdown(tables, runs, labels, left_out),
        "report.html": html(tables, runs, labels, left_out),
        "report.tex": latex(tables),
        "report.csv": _csv(_cell_records(tables)),
        "runs.csv": _csv(provenance(run) for run in runs),
    }
    files.claim(folder, list(texts), "--output")
    for name, text in texts.items():
        with files.one_line(folder, "--output"), files.atomic_write(Path(folder) / name) as file:
            file.write(text.encode())
    return [Path(folder) / name for name in texts]


def markdown(
    tables: Sequence[Table], runs: Sequence[Run], labels: Sequence[str] = (), left_out: Sequence[str] = ()
) -> str:
    """Return the report as Markdown."""
    parts = ["# Results", _LEGEND]
    for table in tables:
        parts += [f"## {table.name} on {table.test_set}", "\n".join(f"* {line}" for line in about(table))]
        parts.append(_markdown_table(*result_lines(table)))
        if table.differences:
            parts.append(_markdown_table(*difference_lines(table)))
        pair = summary.compared(table, labels)
        for metric, entries in summary.per_class(*pair).items() if pair else ():
            first, second = (row.label for row in pair or ())
            body = [(name, f"{a}", f"{b}", signed(a.mean - b.mean)) for name, a, b in entries]
            head = (f"{heading(metric)} of", first, second, "difference")
            parts.append(f"<details><summary>{heading(metric)} by class</summary>\n\n{_markdown_table(head, body)}")
            parts[-1] += "\n\n</details>"
    records = [provenance(run) for run in runs]
    # Values that all runs share are listed once, below the table: they are many and long.
    own = [key for key in records[0] if key != "command" and (key == "folder" or len({r[key] for r in records}) > 1)]
    shared = [key for key in records[0] if key not in (*own, "command") and records[0][key]]
    parts += ["## Origin of the figures", _markdown_table(own, [[r[key] for key in own] for r in records])]
    if shared:
        parts += ["All runs:", "\n".join(f"* {key}: {records[0][key]}" for key in shared)]
    parts += ["Commands:", "\n".join(f"    {record['command']}" for record in records)]
    if left_out:
        parts += [f"{len(left_out)} left out:", "\n".join(f"* {problem}" for problem in left_out)]
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """Return the report's tables as LaTeX, for the package booktabs."""
    lines = ["% \\usepackage{booktabs}"]
    for table in tables:
        for head, body in (result_lines(table), difference_lines(table)):
            if not body:
                continue
            lines += ["", f"% {table.name} on {table.test_set}; {table.variant or 'the protocol as it is shipped'}"]
            lines += [f"\\begin{{tabular}}{{{'l' * (len(head) - len(table.columns))}{'r' * len(table.columns)}}}"]
            rows = [" & ".join(map(_latex_text, line)) + r" \\" for line in (head, *body)]
            lines += [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def html(tables: Sequence[Table], runs: Sequence[Run], labels: Sequence[str] = (), left_out: Sequence[str] = ()) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text())
    return template.render(
        tables=tables,
        runs=runs,
        left_out=left_out,
        anchors={run.file: f"run-{number}" for number, run in enumerate(runs, start=1)},
        pairs=[summary.compared(table, labels) for table in tables],
        about=about,
        heading=heading,
        published_cell=published_cell,
        signed=signed,
        learning_curves=lambda table: [Markup(drawing) for drawing in curves.learning_curves(table)],
        fraction_curves=lambda table: Markup(curves.fraction_curves(table)),
        per_class=summary.per_class,
        provenance=provenance,
        legend=_LEGEND,
        flag=FLAG,
        version=moco_d2.__version__,
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    )


def about(table: Table) -> list[str]:
    """Return what a reader must know about a table, a sentence per line."""
    lines = []
    if table.protocol:
        lines.append(f"config {table.protocol.config}; paper row: {table.protocol.paper}; {table.protocol.evidence}")
    else:
        lines.append("not a known protocol: there are no published figures")
    if table.variant:
        lines.append(table.variant)
    if not table.comparable:
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


def provenance(run: Run) -> dict[str, str]:
    """Return the origin of a run's figures: folder, code, weights, machine, settings."""
    result, weights = run.result, run.weights
    versions = {**(result.get("versions") or {}), "python": result.get("python")}
    return {
        "protocol": run.protocol,
        "pre-train": run.label,
        "labels": f"{run.percent:g}%",
        "seed": str(result.get("seed", "")),
        "folder": str(run.folder),
        "commit": str(result.get("commit") or ""),
        "date": str(result.get("date") or ""),
        "hardware": f"{run.processes} x {result.get('device', '?')}",
        "iterations": str(result.get("iterations", "")),
        "weights": str(weights.get("path") or ""),
        "weights SHA-256": run.sha256,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "performance options": run.performance,
        "departures": "not recorded" if run.changes is None else " ".join(run.changes),
        "scaled": run.scaled,
        "command": str(result.get("command") or ""),
    }


_LEGEND = (
    "Mean ± sample standard deviation (number of runs), in percent. Published figures are the papers' own. "
    f"{FLAG} marks a difference from the published row of more than {summary.FLAG_STD} published standard deviations. "
    "A table holds runs of one protocol, and of one variant of it."
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


def _csv(records: Iterable[Mapping[str, str]]) -> str:
    """Return records as CSV; a key that a record does not have is an empty cell."""
    listed = list(records)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for r in listed for key in r)), "", lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return file.getvalue()
