"""What came out: mean and spread over seeds, as rows, Markdown, JSON and a rich table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from kdqat.study.expand import Variation
from kdqat.study.file import Study


@dataclass(frozen=True)
class Row:
    """A variation with what its seeds measured.

    Attributes:
        mean, std, n: by metric; std is the sample's, None for one seed.
        rtn: of the same metrics, before training.
    """

    variation: Variation
    mean: dict[str, float]
    std: dict[str, float | None]
    n: int
    rtn: dict[str, float]
    seconds: float


def rows(which: Sequence[Variation], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """A row for every variation with a finished run, in the order of `which`."""
    made = []
    for variation in which:
        runs = results.get(variation.name, ())
        if not runs:
            continue
        names = [name for name in runs[0]["metrics"] if all(name in run["metrics"] for run in runs)]
        values = {name: [run["metrics"][name] for run in runs] for name in names}
        made.append(
            Row(
                variation,
                {name: mean(seen) for name, seen in values.items()},
                {name: _spread(seen) for name, seen in values.items()},
                len(runs),
                {k: mean(r["rtn"][k] for r in runs if k in r["rtn"]) for k in runs[0]["rtn"]},
                sum(run["seconds"] for run in runs),
            )
        )
    return made


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def shown_metrics(study: Study, measured: Sequence[str], metric: str) -> list[str]:
    """The study's metric, and beside it the same number of other texts (or what the file asks for)."""
    ending = metric.rpartition(".")[2]
    others = study.metrics if study.metrics is not None else [m for m in measured if m.endswith(f".{ending}")]
    return list(dict.fromkeys([metric, *others]))


def table(
    study: Study, found: Sequence[Row], metric: str, survivors: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Columns and lines.

    Args:
        survivors: names of variations that go on, for a table of short runs, which is sorted by `metric`.
    """
    axes = list(dict.fromkeys(axis for row in found for axis in row.variation.labels))
    metrics = shown_metrics(study, list(found[0].mean) if found else [], metric)
    columns = [*axes, *metrics, f"RTN {metric}", "n", *(["goes on"] if survivors is not None else [])]
    if survivors is not None:
        sign = 1 if study.best == "lowest" else -1
        found = sorted(found, key=lambda r: math.inf if math.isnan(r.mean[metric]) else sign * r.mean[metric])
    lines = []
    for row in found:
        line = [str(row.variation.labels.get(axis, "")) for axis in axes]
        line += [_number(row.mean.get(name), row.std.get(name)) for name in metrics]
        line += [_number(row.rtn.get(metric), None), str(row.n)]
        line += [] if survivors is None else ["yes" if row.variation.name in survivors else ""]
        lines.append(line)
    return columns, lines


def _number(value: float | None, std: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + ("" if std is None else f" ± {std:.2g}")


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain data, every metric in them."""
    return [
        {
            "variation": row.variation.name,
            "labels": row.variation.labels,
            "settings": row.variation.settings,
            "n": row.n,
            "mean": row.mean,
            "std": row.std,
            "rtn": row.rtn,
            "seconds": row.seconds,
        }
        for row in found
    ]


def as_markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    head = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines])


def print_rich(console: Console, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on the terminal; Markdown where there is none."""
    if not console.is_terminal:
        console.print(f"{title}\n\n{as_markdown(columns, lines)}\n", soft_wrap=True)
        return
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column)
    for line in lines:
        made.add_row(*line)
    console.print(made)
