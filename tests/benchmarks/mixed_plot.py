"""Students of mixed bits beside uniform ones: KL to the teacher after training, by average bits.

    python tests/benchmarks/mixed_plot.py docs/results/2026-11-22-mixed-h200.jsonl docs/images/mixed_bits.png

Rows have a plan's name as `mixed_plans.py` gives it (uniform: the preset's), average_bits, seed and texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

TEXTS = {"c4": "C4 (like the training text)", "wikitext2": "WikiText-2", "ptb": "PTB"}
KINDS = {  # longest names first: a plan's name begins with its kind's
    "pair-random": ("random, 2 widths", "0.5", "x"),
    "lim-pair": ("LIM, 2 widths", "tab:blue", "^"),
    "pair": ("knapsack, 2 widths", "tab:red", "o"),
    "random": ("random, 4/3/2", "0.75", "+"),
    "lim": ("LIM, 4/2", "tab:cyan", "v"),
    "knapsack": ("knapsack, 4/3/2", "tab:orange", "s"),
}


def main(source: str, target: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    figure, axes = pyplot.subplots(1, len(TEXTS), figsize=(14, 4.6), layout="constrained")
    for ax, (text, title) in zip(axes, TEXTS.items(), strict=True):
        draw(ax, rows, text)
        ax.set(yscale="log", xlabel="average bits, scales counted", ylabel="KL to the teacher", title=title)
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=90)


def draw(ax: Any, rows: Sequence[Mapping[str, Any]], text: str) -> None:
    """Uniform students with straight lines in KL between them (curved here), mixed ones as marks."""
    uniform: dict[float, list[float]] = {}
    for row in rows:
        kl = row["texts"][text]["kl"]
        kind = next((kind for kind in KINDS if row["plan"].startswith(f"{kind}-")), None)
        if kind is None:
            uniform.setdefault(row["average_bits"], []).append(kl)
            continue
        label, color, mark = KINDS[kind]
        known = label in ax.get_legend_handles_labels()[1]
        ax.plot(row["average_bits"], kl, mark, color=color, label=None if known else label, alpha=0.85)
    bits = sorted(uniform)
    ends = [fmean(uniform[bit]) for bit in bits]
    fine = [low + (high - low) * i / 40 for low, high in pairwise(bits) for i in range(41)]
    ax.plot(
        fine, [between(bits, ends, x) for x in fine], "-", color="black", linewidth=1, label="uniform, interpolated"
    )
    ax.plot(bits, ends, "k*", markersize=9, label="uniform")


def between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear interpolation."""
    i = max(i for i in range(len(xs) - 1) if xs[i] <= x)
    return ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i])


if __name__ == "__main__":
    main(*sys.argv[1:])
