"""Which layer has how many bits at which step: the schedules of `BitSchedule` as plain functions. No torch.

A layer's steps are pairs (first optimizer step, bits), ascending; before the first of them it has its plan's bits.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

Steps: TypeAlias = tuple[tuple[int, int], ...]
Shape = Literal["linear", "cosine"]


def bits_at(steps: Steps, step: int, plan: int) -> int:
    """The bits of a layer at optimizer step `step`, counted from 0; `plan`: its plan's."""
    place = bisect_right(steps, (step, math.inf))
    return steps[place - 1][1] if place else plan


def spread(count: int, start: int, stop: int, shape: Shape) -> list[int]:
    """`count` steps from `start` to `stop`, both among them (a single one is `stop`).

    "linear": evenly. "cosine": at time t, from 0 to 1, a share (1 - cos(pi t)) / 2 of them has been: seldom at both
    ends, often in the middle.
    """
    shares = [k / (count - 1) for k in range(count)] if count > 1 else [1.0]
    if shape == "cosine":
        shares = [math.acos(1 - 2 * share) / math.pi for share in shares]
    return [start + round(share * (stop - start)) for share in shares]


def by_milestones(milestones: Mapping[int, int | None], plan: int) -> Steps:
    """Widths from steps on; None is the plan's."""
    return changes([(step, plan if bits is None else bits) for step, bits in sorted(milestones.items())], plan)


def progressive_steps(widths: Sequence[int | None], until: int, shape: Shape, plan: int) -> Steps:
    """One width after another, the first at step 0 and the last at `until`; never fewer bits than the plan's."""
    moments = spread(len(widths), 0, until, shape)
    return changes([(step, max(w or plan, plan)) for step, w in zip(moments, widths, strict=True)], plan)


def ranked_steps(
    units: Sequence[Sequence[str]], first_bits: int, start: int, stop: int, shape: Shape, plan: Mapping[str, int]
) -> dict[str, Steps]:
    """Every layer begins with `first_bits` (or its plan's, if they are more) and goes to its plan's bits, unit by unit.

    Args:
        units: layers that go together, the least important ones first.
        plan: layer -> bits.
    """
    steps = {}
    for moment, unit in zip(spread(len(units), start, stop, shape), units, strict=True):
        for layer in unit:
            steps[layer] = changes([(0, max(first_bits, plan[layer])), (moment, plan[layer])], plan[layer])
    return steps


def changes(steps: Sequence[tuple[int, int]], plan: int) -> Steps:
    """Only what changes something; of two widths at one step the later one."""
    found: list[tuple[int, int]] = []
    for step, bits in dict(steps).items():
        if bits != (found[-1][1] if found else plan):
            found.append((step, bits))
    return tuple(found)
