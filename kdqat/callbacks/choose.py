"""The student's layers as callbacks choose them."""

from __future__ import annotations

from collections.abc import Collection

from kdqat.models import select_layers
from kdqat.quant import QuantizedLayer
from kdqat.student import Student


def chosen_layers(
    student: Student,
    *,
    roles: Collection[str] | None,
    blocks: Collection[int] | None,
    layers: Collection[str] | None,
    who: str,
) -> dict[str, QuantizedLayer]:
    """The layers that `select_layers` chooses, and those whose weight is tied to one of them.

    Raises:
        ValueError: as `select_layers`.
    """
    there = student.layers
    refs = select_layers(student.refs, roles=roles, blocks=blocks, layers=layers, who=who)
    weights = {id(there[ref.name].weight) for ref in refs}
    return {name: layer for name, layer in there.items() if id(layer.weight) in weights}
