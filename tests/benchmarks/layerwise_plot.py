"""Rows of `layerwise_curve.py` as a plot: a column for each backend, KL and perplexity by the share of low-bit blocks.

python tests/benchmarks/layerwise_plot.py docs/results/2026-11-22-layerwise-h200.jsonl docs/images/layerwise_curve.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"LIM": "tab:blue", "ZD": "tab:green", "OutputKL": "tab:orange", "knapsack": "tab:red"}
LABELS = {"kl": "KL to full precision", "perplexity": "perplexity, WikiText-2"}


def main(source: str, target: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    backends, pairs = (list(dict.fromkeys(row[key] for row in rows)) for key in ("backend", "bits"))
    lines = [(bits, key) for bits in pairs for key in LABELS]
    size = (4.2 * len(backends), 3.1 * len(lines))
    figure, axes = pyplot.subplots(len(lines), len(backends), figsize=size, squeeze=False, layout="constrained")
    for line, (bits, key) in zip(axes, lines, strict=True):
        for ax, backend in zip(line, backends, strict=True):
            draw(ax, [row for row in rows if (row["backend"], row["bits"]) == (backend, bits)], key)
            ax.set(xlabel=f"share of blocks moved from {bits} bits", ylabel=LABELS[key], title=backend)
            ax.set_yscale("log" if bits == "4 to 2" else "linear")
    axes[0][0].legend(fontsize=7)
    figure.savefig(target, dpi=80)


def draw(ax: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Orders are lines, reversed ones dashed in the same colour; random orders a band with their mean."""
    by_share: dict[float, list[float]] = {}
    for row in rows:
        if row["order"].startswith("random"):
            by_share.setdefault(row["share"], []).append(row[key])
    shares = sorted(by_share)
    if shares:
        low, high = ([end(by_share[share]) for share in shares] for end in (min, max))
        ax.fill_between(shares, low, high, color="0.87", label="random: all of 5")
        ax.plot(shares, [sum(by_share[s]) / len(by_share[s]) for s in shares], color="0.5", label="random: mean")
    for order in dict.fromkeys(row["order"] for row in rows if not row["order"].startswith("random")):
        name, _, is_reversed = order.partition(" ")
        points = sorted((row["share"], row[key]) for row in rows if row["order"] == order)
        style, label = (":", None) if is_reversed else ("-", name)
        ax.plot(*zip(*points, strict=True), style, marker=".", color=COLORS[name], label=label)


if __name__ == "__main__":
    main(*sys.argv[1:])
