"""Where weights lie on their grid at one moment: of every layer some rows, evenly spaced, as the quantizer rounds them.

Not all weights: shares over 64 rows of a layer (65 536 weights at a width of 1024) are known well enough to see them
move, and a copy of some rows costs nothing where a copy of a model would. Codes are those that an exporter would write
(the quantizer's own stored scales, and the weight with the adapter inside of it). Layers of one spec and width are
stacked (`probe/stacks.py` says why). Under FSDP2 a block's parameters are gathered while it is looked at, so that every
rank has the same rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdqat.models import SplitModel, blocks_of
from kdqat.quant import FakeQuantizer
from kdqat.quant.formats import Grid, half_gap
from kdqat.quant.functional import quantize
from kdqat.quant.quantizer import round_qparams
from kdqat.spec import QuantSpec
from kdqat.training.probe.plain import gathered
from kdqat.types import LayerRef, QParams

LIMIT = 1 << 25  # weights in one stack


class GridRows(NamedTuple):
    """Rows of several layers of one spec and width, [R, N, G] in all; R are the rows of all of them."""

    refs: tuple[LayerRef, ...]
    counts: tuple[int, ...]  # rows of each
    weights: Tensor  # [R, N, G] fp32, rotated where the spec says so
    scale: Tensor  # [R, N or 1, 1] as stored
    codes: Tensor  # [R, N, G] int8: the nearest level's number in ascending order, see `_ranks`
    offset: Tensor  # [R, N, G] fp32: how far that level is, 1 at the threshold to the next one; clipped: further
    high: Tensor  # [R, 1, 1] the highest level now: a schedule of bits changes it, and the spec stays the plan's
    spec: QuantSpec

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each layer's weights of `values` [R, N, G] (or what broadcasts over G): [L]."""
        by_row = values.float().flatten(1).mean(1)
        if len(set(self.counts)) == 1:
            return by_row.view(len(self.counts), -1).mean(1)
        return torch.stack([part.mean() for part in by_row.split(list(self.counts))])

    @property
    def key(self) -> tuple[Any, ...]:
        """Two snapshots of one key are of the same weights; their codes are comparable where `high` is the same."""
        return tuple(ref.name for ref in self.refs), self.counts, self.spec


class _Rows(NamedTuple):
    ref: LayerRef
    quantizer: FakeQuantizer
    matrix: Tensor
    qparams: QParams  # as stored where scales have a second level; else `_stack` rounds those of many layers at once


@torch.no_grad()
def grid_rows(
    split: SplitModel, refs: Sequence[LayerRef], layers: Mapping[str, Any], max_rows: int | None
) -> Iterator[GridRows]:
    """The chosen rows of `refs`, always in the same order; collective under FSDP2.

    Args:
        layers: by name, as `Student.layers`.
        max_rows: of each layer; None: all.
    """
    blocks = blocks_of(split.model)
    pending: dict[Any, list[_Rows]] = {}
    sizes: Counter[Any] = Counter()  # weights in them
    units: dict[int | None, list[LayerRef]] = {}
    for ref in refs:
        units.setdefault(ref.block, []).append(ref)
    for block, members in units.items():
        owner: nn.Module = split if block is None else blocks[block]
        with gathered(owner) as sharded:
            for ref in members:
                layer = layers[ref.name]
                rows = _rows(ref, layer.weight_fake_quantizer, layer.latent_matrix().detach(), max_rows)
                key = (rows.quantizer.spec, rows.matrix.shape[1], rows.matrix.device)
                pending.setdefault(key, []).append(rows)
                sizes[key] += rows.matrix.numel()
                if sizes[key] >= LIMIT:
                    yield _stack(pending.pop(key))
                    sizes[key] = 0
            if sharded:  # the parameters go when the block is left
                for waiting in pending.values():
                    yield _stack(waiting)
                pending, sizes = {}, Counter()
    for waiting in pending.values():
        yield _stack(waiting)


def _rows(ref: LayerRef, quantizer: FakeQuantizer, matrix: Tensor, max_rows: int | None) -> _Rows:
    found = quantizer.qparams(matrix if quantizer.skips_groups else quantizer.groups(matrix))
    found = quantizer.as_stored(found) if quantizer.has_second_level else found
    height = matrix.shape[0]
    stride = 1 if max_rows is None else max(1, -(-height // max_rows))
    count = len(range(0, height, stride))

    def some(values: Tensor) -> Tensor:
        values = values if values.ndim == 3 else values.reshape(1, 1, 1)
        return values[::stride] if values.shape[0] == height else values.expand(count, -1, -1)

    # a copy: with an adapter inside, a view would keep a whole matrix of its own
    return _Rows(ref, quantizer, matrix[::stride].contiguous(), QParams(some(found.scale), some(found.zero_point)))


def _stack(items: list[_Rows]) -> GridRows:
    first, spec = items[0].quantizer, items[0].quantizer.spec
    counts = tuple(len(item.matrix) for item in items)
    weights = first.groups(torch.cat([item.matrix for item in items]))
    low, high = (  # a schedule of bits changes them in place
        torch.cat([getattr(item.quantizer, end).expand(len(item.matrix)) for item in items]).view(-1, 1, 1)
        for end in ("qmin", "qmax")
    )
    qparams = QParams(*(torch.cat([item.qparams[i] for item in items]) for i in (0, 1)))
    scale, zero_point = qparams if first.has_second_level else round_qparams(qparams, spec, low, high)
    grid: Grid = first.grid._replace(low=low, high=high)
    level = quantize(weights, QParams(scale, zero_point), grid, spec)
    steps = (weights - zero_point) / scale if spec.zero_point == "minimum" else weights / scale
    steps = steps + zero_point if spec.zero_point == "integer" else steps
    half = half_gap(torch.minimum(torch.maximum(steps, low), high), level, grid)
    offset = (steps - level).abs() / half
    codes = _ranks(level, spec, low, high)
    return GridRows(tuple(item.ref for item in items), counts, weights, scale, codes, offset, high, spec)


def _ranks(level: Tensor, spec: QuantSpec, low: Tensor, high: Tensor) -> Tensor:
    """Levels as numbers in ascending order, from the middle of the grid, int8: no format has more than 256.

    Args:
        low, high: the live ends of the grid, of which integers are counted from the middle.
    """
    number = spec.number
    if number.kind == "integer":
        half = 0.5 if spec.zero_point == "half" else 0.0
        return (level - half - ((low + high + 1) / 2 - half).floor()).to(torch.int8)
    values = number.levels if number.kind == "codebook" else number.code_values()
    table = torch.tensor(sorted({value for value in values if math.isfinite(value)})).to(level)
    return (torch.bucketize(level, table) - len(table) // 2).to(torch.int8)
