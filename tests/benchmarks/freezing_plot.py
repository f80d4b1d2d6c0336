"""The freezing study as a plot: KL to the teacher by learning rate, and by condition, for every set of frozen roles.

    python tests/benchmarks/freezing_plot.py docs/results/2026-11-22-freezing-h200.jsonl docs/images/freezing.png

Rows are those of `smollm2_sweep.py` and of `kdqat study`, with condition, freeze, lr, seed and texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"none": "black", "o+v": "tab:red", "q+k+v": "tab:blue", "o": "tab:orange", "v": "tab:green", "k+q": "0.6"}
MARKS = {"c4": "o", "wikitext2": "s", "ptb": "^"}


def main(source: str, target: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 4.4), layout="constrained", gridspec_kw={"width_ratios": [1, 1.7]}
    )
    by_rate(left, [row for row in rows if row["condition"] == "screen"])
    by_condition(right, [row for row in rows if row["condition"] != "screen"])
    figure.savefig(target, dpi=120)


def by_rate(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """KL after the short runs."""
    for freeze, color in COLORS.items():
        points = sorted((row["lr"], row["texts"]["c4"]["kl"]) for row in rows if row["freeze"] == freeze)
        ax.plot(*zip(*points, strict=True), marker="o", color=color, label=freeze)
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="KL to the teacher, C4", title="75 steps")
    ax.legend(title="frozen", fontsize=8)


def by_condition(ax: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """KL over that of the same condition with nothing frozen, each text a mark, each seed one of its own."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    for row in rows:
        if row["freeze"] == "none":
            continue
        for text, mark in MARKS.items():
            free = [r["texts"][text]["kl"] for r in rows if (r["condition"], r["freeze"]) == (row["condition"], "none")]
            place = conditions.index(row["condition"]) + 0.13 * (list(COLORS).index(row["freeze"]) - 3)
            ratio = row["texts"][text]["kl"] / fmean(free)
            ax.plot(place, ratio, mark, color=COLORS[row["freeze"]], alpha=0.7, markersize=5)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xticks(range(len(conditions)), conditions, fontsize=8, rotation=15)
    ax.set(ylabel="KL / KL with nothing frozen", title="300 steps")
    marks = [pyplot.Line2D([], [], marker=mark, linestyle="", color="0.4", label=text) for text, mark in MARKS.items()]
    ax.legend(handles=marks, fontsize=8)


if __name__ == "__main__":
    main(*sys.argv[1:])
