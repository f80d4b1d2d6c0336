"""A picture of scores: a bar for each block or layer, the model's first one on the left; costs as lines."""

from __future__ import annotations

from pathlib import Path

from kdqat.files import whole_file
from kdqat.spec import Scores


def plot_scores(scores: Scores, path: Path) -> None:
    """Write a PNG to `path`, whole or not at all.

    Raises:
        ModuleNotFoundError: without matplotlib, which is optional (`pip install kdqat[report]`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num = len(scores.importance)
    names = [str(i) for i in range(num)] if scores.unit == "block" else list(scores.importance)
    figure, axes = pyplot.subplots(figsize=(max(6.0, min(0.25 * num, 40.0)), 4.5), layout="constrained")
    try:
        axes.bar(range(num), list(scores.importance.values()), color="0.75")
        axes.set_xticks(range(num), names, rotation=90 if scores.unit == "layer" else 0, fontsize=6)
        axes.set_xlabel(scores.unit)
        axes.set_ylabel(f"importance by {scores.method}: higher = more bits")
        if scores.cost:
            right = axes.twinx()
            for scheme in scores.schemes:
                costs = [max(scores.cost[unit][scheme], 1e-12) for unit in scores.importance]
                right.semilogy(range(num), costs, marker=".", label=scheme)
            right.set_ylabel("cost")
            right.legend(fontsize=7)
        with whole_file(path) as part:
            figure.savefig(part, format="png", dpi=120)
    finally:
        pyplot.close(figure)
