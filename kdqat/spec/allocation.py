"""Why a layer got its bits: what an allocator notes beside its plan, and the same as rows for a report.

Plain data, no torch: `kdqat report` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ALLOCATION_FILE = "allocation.json"


@dataclass(frozen=True)
class Choice:
    """What got a scheme as one: a block, a family of layers that an engine fuses, or a layer.

    Args:
        name: of the block; of a family or layer the full name of its first layer.
        layers: the layers.
        rank: 1 is the most important one; None where no ranking was used.
        importance: its score.
        scheme: the name of the scheme it got.
        average_bits: its bits per weight, counted with scales and zero points.
        cost: the measured cost of that scheme; None where none was measured.
    """

    name: str
    layers: tuple[str, ...]
    rank: int | None
    importance: float
    scheme: str
    average_bits: float
    cost: float | None = None


@dataclass(frozen=True)
class Allocation:
    """How a budget was spent.

    Args:
        allocator: class name.
        method, order: of the scores, and how they were used.
        budget: in words, e.g. "3.0 average bits".
        budget_bits: what the planned layers may take in all; used_bits: what they do take.
        choices: one for everything that got a scheme by the budget, in the model's order.
        fixed: layer -> scheme, for what overrides decided.
    """

    allocator: str
    method: str
    order: str
    budget: str
    budget_bits: float
    used_bits: float
    choices: tuple[Choice, ...]
    fixed: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the content of `allocation.json`."""
        return asdict(self)


def explain_allocation(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for a table, one for each choice, the most important first; `content` is that of `allocation.json`.

    Keys: unit, layers (how many), rank, importance, scheme, bits, cost, why (one sentence).
    """
    choices: Sequence[Mapping[str, Any]] = content["choices"]
    ranked = sorted(choices, key=lambda choice: (choice["rank"] is None, choice["rank"]))
    rows = [_row(choice, len(choices), content) for choice in ranked]
    for name, scheme in content["fixed"].items():
        why = "named in overrides, or an embedding"
        nothing = {"rank": None, "importance": None, "bits": None, "cost": None}
        rows.append({"unit": name, "layers": 1, "scheme": scheme, **nothing, "why": why})
    return rows


def describe_budget(content: Mapping[str, Any]) -> str:
    """One line: what the budget was, and what of it is left."""
    slack = content["budget_bits"] - content["used_bits"]
    share = 100 * slack / content["budget_bits"]
    return (
        f"{content['allocator']} by {content['method']} ({content['order']}): {content['budget']}, "
        f"{content['used_bits'] / 8e6:.3f} MB of {content['budget_bits'] / 8e6:.3f} MB used, {share:.2f} % left"
    )


def _row(choice: Mapping[str, Any], num: int, content: Mapping[str, Any]) -> dict[str, Any]:
    if content["allocator"] == "Knapsack":
        why = f"part of the choice with the least sum of costs; here {choice['cost']:.4g} by {content['method']}"
    else:
        why = f"rank {choice['rank']} of {num} by {content['method']} ({content['order']})"
    return {
        "unit": choice["name"],
        "layers": len(choice["layers"]),
        "rank": choice["rank"],
        "importance": choice["importance"],
        "scheme": choice["scheme"],
        "bits": choice["average_bits"],
        "cost": choice["cost"],
        "why": why,
    }
