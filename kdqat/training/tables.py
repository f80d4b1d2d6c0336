"""Rows of a probe's pass: which place of the model a value is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from kdqat.training.probe import ProbePass, compare
from kdqat.training.probe.capture import attention_refs, block_refs
from kdqat.types import LayerRef


def places_of(model: nn.Module, refs: Sequence[LayerRef]) -> dict[str, LayerRef]:
    """Layers, blocks and attention modules by the names under which a pass knows them."""
    return {ref.name: ref for ref in (*refs, *block_refs(model), *attention_refs(model))}


def signal_values(
    seen: ProbePass, positions: Tensor | None, places: Mapping[str, LayerRef]
) -> Iterator[tuple[str, list[LayerRef | None], Tensor]]:
    """Metric, places and values [L] of student against teacher, None for a place that is not among `places`.

    Args:
        positions: [n] indices of the tokens that count among B * T; None: all.
    """
    assert seen.teacher is not None
    for metric, (names, values) in compare(seen.student, seen.teacher, positions).items():
        yield metric, [places.get(name) for name in names], values  # no selection there: it would wait for the device
