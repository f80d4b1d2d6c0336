"""Tables by role of what observers measured, and which roles a freeze study should begin with. No torch.

The recommendation ranks roles by how much larger their weights' gradient is in the fake-quantized model than in the
full-precision one (https://arxiv.org/abs/2403.18159 finds o and v ahead, and freezes them). That is all it says;
whether freezing helps is for a study to find out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

RATIO = "ce_weight_energy_ratio"
MARGIN = 1.25  # a role stands out if its ratio is so many times that of the middle role

Row = Mapping[str, Any]


class Recommendation(NamedTuple):
    """Roles by falling median ratio, those that stand out, and over how many steps and layers it was measured."""

    ratios: dict[str, float]
    freeze: tuple[str, ...]
    steps: int

    def sentence(self) -> str:
        """The answer, with what it rests on."""
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        if not self.freeze:
            return (
                f"freeze nothing: over {steps} no role's gradient energy, normalised by the full-precision model's, is "
                f"{MARGIN} times that of the middle role"
            )
        return (
            f"freeze {', '.join(self.freeze)}: over {steps} their gradient energy, normalised by the full-precision "
            f"model's, is at least {MARGIN} times that of the middle role; whether freezing helps is not measured here"
        )


def recommend(rows: Iterable[Row]) -> Recommendation:
    """Rank roles by the median over layers and steps of the weight gradient's energy over the full-precision model's.

    Args:
        rows: as signals.parquet, of GradientLog(full_precision_ratio=True), or what `kdqat.api.signals` gives.

    Raises:
        ValueError: if no row has the ratio.
    """
    by_role: dict[str, list[float]] = {}
    steps = set()
    for row in rows:
        if row["metric"] == RATIO and math.isfinite(row["value"]):
            by_role.setdefault(row["role"], []).append(row["value"])
            steps.add(row["step"])
    if not by_role:
        raise ValueError(
            "signals: nothing to recommend from: train with GradientLog(full_precision_ratio: true), or measure a "
            "causal language model with `kdqat signals`"
        )
    ratios = dict(sorted(((role, median(values)) for role, values in by_role.items()), key=lambda item: -item[1]))
    middle = median(ratios.values())
    return Recommendation(ratios, tuple(role for role, ratio in ratios.items() if ratio >= MARGIN * middle), len(steps))


def role_table(rows: Sequence[Row], metrics: Sequence[str] = ("sqnr_db", "gain", "cosine", RATIO)) -> str:
    """A Markdown table of one step: a line per role, the lowest SQNR first; medians over layers, and the worst SQNR."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values.setdefault(row["role"], {}).setdefault(row["metric"], []).append(row["value"])
    shown = [metric for metric in metrics if any(metric in of for of in values.values())]
    lines = [
        "| role | layers | " + " | ".join(shown) + " | lowest sqnr_db |",
        "| --- | ---: |" + " ---: |" * (len(shown) + 1),
    ]
    order = sorted((role for role in values if "sqnr_db" in values[role]), key=lambda r: median(values[r]["sqnr_db"]))
    for role in order:
        of = values[role]
        cells = [f"{median(of[metric]):.4g}" if metric in of else "" for metric in shown]
        lines.append(f"| {role} | {len(of['sqnr_db'])} | {' | '.join(cells)} | {min(of['sqnr_db']):.2f} |")
    return "\n".join(lines)
