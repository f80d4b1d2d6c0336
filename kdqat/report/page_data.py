"""What the page shows of a run: facts, curves and signals, as plain lists. pyarrow is imported where signals are."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdqat.report.report import describe
from kdqat.report.run_dir import read_yaml

COLUMNS = {
    "step": "int64", "source": "string", "metric": "string", "block": "int64", "role": "string", "value": "double",
}  # fmt: skip
MAX_STEPS = 40  # of a heatmap's slider
MAX_POINTS = 400  # of a curve
ROLES = (
    "embedding",
    "q",
    "k",
    "v",
    "qkv",
    "o",
    "attention",
    "gate",
    "up",
    "gate_up",
    "down",
    "router",
    "block",
    "lm_head",
)
OUTSIDE = -1

Cell = tuple[int, str]  # block, role
Curve = list[tuple[float, float]]


@dataclass
class Signals:
    """Values of one metric: by step, by cell, the mean where a cell has several layers.

    Attributes:
        name: "SOURCE/METRIC".
    """

    name: str
    steps: dict[int, dict[Cell, float]] = field(default_factory=dict)

    def roles(self) -> set[str]:
        """Roles with a value at some step."""
        return {role for cells in self.steps.values() for _, role in cells}

    def by_role(self) -> dict[str, Curve]:
        """The mean over blocks, step by step."""
        curves: dict[str, Curve] = defaultdict(list)
        for step, cells in sorted(self.steps.items()):
            roles: dict[str, list[float]] = defaultdict(list)
            for (_, role), value in cells.items():
                if math.isfinite(value):
                    roles[role].append(value)
            for role, values in roles.items():
                curves[role].append((step, sum(values) / len(values)))
        return {role: curves[role] for role in in_order(curves)}


@dataclass
class PageRun:
    """A run directory as the page needs it.

    Attributes:
        facts: see `describe`.
        recipe: the resolved recipe, flat, by dotted key.
        curves: of metrics.csv, by column.
        signals: of signals.parquet, by "SOURCE/METRIC".
        events: (step, source, metric, value) of the whole model: what guards said.
        missing: what is not there, in words.
    """

    name: str
    facts: dict[str, Any]
    recipe: dict[str, Any]
    curves: dict[str, Curve]
    signals: dict[str, Signals]
    events: list[tuple[int, str, str, float]]
    missing: list[str]


def read_run(run: Path) -> PageRun:
    """Read a run directory; what is missing or damaged of its measurements is noted, and left out.

    Raises:
        ValueError: if `run` is no run directory.
    """
    facts, missing = describe(run), []
    curves = _curves(run / "metrics.csv")
    if not curves:
        missing.append("no metrics.csv: no curves of the loss")
    signals: dict[str, Signals] = {}
    events: list[tuple[int, str, str, float]] = []
    path = run / "signals.parquet"
    if not path.is_file():
        missing.append("no signals.parquet: no heatmaps (GradientLog, SignalLog or OscillationLog write it)")
    else:
        try:
            signals, events = read_signals(path)
        except (OSError, ValueError, KeyError) as error:
            missing.append(f"signals.parquet cannot be read ({' '.join(str(error).split())})")
    if not facts["eval"]:
        missing.append("no eval.json: no table of before and after")
    recipe = dict(_flat(read_yaml(run / "recipe.yaml")))
    return PageRun(str(run), facts, recipe, curves, signals, events, missing)


def read_signals(path: Path) -> tuple[dict[str, Signals], list[tuple[int, str, str, float]]]:
    """Signals of layers, and what was said of the whole model.

    Raises:
        ValueError: if the file is damaged, or a column holds something else.
        KeyError: if a column is missing.
    """
    import pyarrow.compute
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).select(list(COLUMNS))
    try:
        table = table.cast(pyarrow.schema(list(COLUMNS.items())))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: a column is not of its type: {error}") from error
    empty = [name for name in COLUMNS if name != "value" and table[name].null_count]
    if empty:
        raise ValueError(f"{path}: {empty[0]} is missing in some rows")
    steps = pyarrow.array(evenly(sorted(set(table["step"].to_pylist())), MAX_STEPS), pyarrow.int64())
    whole = table.filter(pyarrow.compute.equal(table["role"], ""))
    events = list(zip(*(whole[name].to_pylist() for name in ("step", "source", "metric", "value")), strict=True))
    table = table.filter(pyarrow.compute.and_(
        pyarrow.compute.is_in(table["step"], steps), pyarrow.compute.not_equal(table["role"], "")
    ))  # fmt: skip
    groups = table.group_by(["source", "metric", "step", "block", "role"]).aggregate([("value", "mean")])
    signals: dict[str, Signals] = {}
    for row in groups.to_pylist():
        name = f"{row['source']}/{row['metric']}"
        value = math.nan if row["value_mean"] is None else row["value_mean"]
        cells = signals.setdefault(name, Signals(name)).steps.setdefault(row["step"], {})
        cells[row["block"], row["role"]] = value
    return signals, events


def in_order(roles: Iterable[str]) -> list[str]:
    """Roles as a block computes them; unknown ones last."""
    return sorted(set(roles), key=lambda role: (ROLES.index(role) if role in ROLES else len(ROLES), role))


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items`, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _curves(path: Path) -> dict[str, Curve]:
    if not path.is_file():
        return {}
    curves: dict[str, Curve] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text)
                if name not in ("step", "epoch") and step is not None and value is not None:
                    curves[name].append((step, value))
    return {name: _thinned(curve) for name, curve in curves.items()}


def _thinned(curve: Curve) -> Curve:
    """Means of neighbouring points, so that a long run's curve stays small."""
    width = -(-len(curve) // MAX_POINTS)
    chunks = (curve[i : i + width] for i in range(0, len(curve), width))
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _flat(content: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) and any(isinstance(item, dict) for item in content):
        for index, item in enumerate(content):
            yield from _flat(item, f"{path}.{index}")
    else:
        yield path, content
