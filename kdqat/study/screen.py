"""Which variations go on after their short runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdqat.study.expand import Variation
from kdqat.study.file import Screen, Study
from kdqat.study.results import measured


def metric_of(study: Study, screen: Screen) -> str:
    """What short runs are judged by."""
    return screen.metric or study.metric


def survivors(
    study: Study, screen: Screen, which: Sequence[Variation], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Variation]:
    """The best `keep` in each group, in the file's order; a run that diverged to NaN is the worst there is.

    Args:
        results: of the finished short runs, by variation; one without any is left out.
    """
    values = {
        name: sum(measured(result, metric_of(study, screen)) for result in runs) / len(runs)
        for name, runs in results.items()
        if runs
    }
    groups: dict[tuple[Any, ...], list[Variation]] = {}
    for variation in which:
        if variation.name in values:
            groups.setdefault(tuple(variation.labels[axis] for axis in screen.per), []).append(variation)
    sign = 1 if study.best == "lowest" else -1

    def rank(variation: Variation) -> float:
        value = values[variation.name]
        return math.inf if math.isnan(value) else sign * value

    chosen = {v.name for group in groups.values() for v in sorted(group, key=rank)[: screen.keep]}
    return [variation for variation in which if variation.name in chosen]
