"""AWQ (https://arxiv.org/abs/2306.00978): inputs that are large get a finer grid, at no cost.

A scale for each input of a layer moves into its weight before rounding, and its inverse into whatever makes the input:
the norm before q, k and v or before gate and up, the rows of v before o, those of up before down. Which layers these
are is a family's affair (`Fold` in kdqat/models/roles.py). In full precision the block computes what it did; that is
checked. Then ranges are clipped where that loses less, but those of q and k.

Inputs are what the blocks before give in full precision, as in the authors' code. v and o of different widths (grouped
queries) are left alone, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kdqat.calibrate import AbsMean, BlockCall, Hessian, calibrating, needs_range
from kdqat.initializers.awq_fold import divide_outputs, foldable, multiply_inputs
from kdqat.initializers.awq_search import search_clip, search_scale
from kdqat.initializers.base import Initializer
from kdqat.initializers.rewrite import naming, quantized_layers, require_rows, round_to_nearest, without_inputs
from kdqat.models.roles import Family
from kdqat.quant import QuantizedLayer, kv_caches
from kdqat.types import BlockView

_UNCLIPPED = ("q", "k", "qkv")  # what they give meets in a product
_TOLERANCE = {torch.float32: 1e-3}  # of a block's output before and after its scales were folded; bf16: 5e-2


class AWQ(Initializer):
    """Scales of inputs folded into what makes them, and clipped ranges; codes by rounding.

    Embeddings round to nearest, with a warning; so does an lm_head tied to one.

    Args:
        num_ratios: exponents r of |x|^r that are tried, from 0 up to below 1.
        clip: also search clipped ranges.
        num_clip_steps: the share of the range goes down by one of so many steps at a time.
        max_shrink: the most that is clipped away.

    Raises:
        ValueError: for numbers that make no search.
    """

    needs_calibration: ClassVar[bool] = True
    rewrites_weights = True

    def __init__(
        self, *, num_ratios: int = 20, clip: bool = True, num_clip_steps: int = 20, max_shrink: float = 0.5
    ) -> None:
        if num_ratios < 1 or num_clip_steps < 1 or not 0 <= max_shrink < 1:
            raise ValueError("AWQ needs num_ratios and num_clip_steps >= 1 and 0 <= max_shrink < 1")
        self.num_ratios, self.clip = num_ratios, clip
        self.num_clip_steps, self.max_shrink = num_clip_steps, max_shrink

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        layers = quantized_layers(block.layers)
        tables = without_inputs(layers)
        round_to_nearest(tables, method="AWQ", reason="an embedding is a lookup and has no inputs")
        searched = {name: layer for name, layer in layers.items() if name not in tables}
        if not searched:
            return
        call: BlockCall = block.call
        roles = _roles(searched, call.prefix, call.family, inside=block.index is not None)
        _refuse_static_ranges(block.layers, call)
        hessians = self._fold(searched, call) if block.index is not None else {}
        missing = {name: Hessian() for name in searched if name not in hessians}
        if missing:
            call.gather({name: (hessian,) for name, hessian in missing.items()})
        for name, layer in searched.items():
            with naming(name):
                hessian = hessians[name] if name in hessians else missing[name].matrix
                self._set_range(layer, hessian, clip=self.clip and roles[name] not in _UNCLIPPED)

    def _set_range(self, layer: QuantizedLayer, hessian: Tensor, *, clip: bool) -> None:
        weight, quantizer = layer.as_matrix(layer.weight).float(), layer.weight_fake_quantizer
        assert quantizer is not None
        require_rows(hessian, weight)
        quantizer.load_qparams(
            search_clip(weight, quantizer, hessian, num_steps=self.num_clip_steps, max_shrink=self.max_shrink)
            if clip
            else quantizer.initial_qparams(quantizer.groups(weight))
        )

    def _fold(self, layers: Mapping[str, QuantizedLayer], call: BlockCall) -> dict[str, Tensor]:
        """Search and fold every scale of a block; the Hessian of each consumer after that, by layer name."""
        assert call.family is not None
        folds = foldable(call.family.folds, call.module, call.prefix, layers)
        heard = {fold.heard: (Hessian(), AbsMean()) for fold in folds}
        if not folds:
            return {}

        call.gather(heard)
        before = _output(call)
        hessians: dict[str, Tensor] = {}
        for fold in folds:
            with naming(fold.heard):
                hessian, magnitude = heard[fold.heard][0].matrix, heard[fold.heard][1].mean
            weights = [(layers[name].as_matrix(layers[name].weight).float(), layers[name].weight_fake_quantizer)
                       for name in fold.quantized]  # fmt: skip
            scale = search_scale(weights, hessian, magnitude, num_ratios=self.num_ratios)  # type: ignore[arg-type]
            divide_outputs(fold.producer, scale, unit_offset=fold.unit_offset)
            for consumer in fold.consumers:
                multiply_inputs(consumer, scale)
            hessians |= dict.fromkeys(fold.quantized, hessian / scale.unsqueeze(1) / scale)
        _require_same(before, _output(call), call)
        return hessians


def _output(call: BlockCall) -> Tensor:
    """What the block gives in full precision to the first micro-batch."""
    with calibrating(call.module, sequential=False):
        return call.tokens(0, call.replay(0)).float()


def _require_same(before: Tensor, after: Tensor, call: BlockCall) -> None:
    dtype = next(call.module.parameters()).dtype
    if (after - before).abs().amax() > _TOLERANCE.get(dtype, 5e-2) * before.abs().amax():
        raise ValueError(
            f"block {call.prefix}: its output in full precision changed when AWQ folded scales, so the folds of its "
            "family (kdqat/models/roles.py) do not hold for this model: use GPTQ or MSEGrid"
        )


def _roles(layers: Mapping[str, QuantizedLayer], prefix: str, family: Family | None, *, inside: bool) -> dict[str, str]:
    known = {} if family is None else family.roles
    roles = {}
    for name in layers:
        suffix = name.removeprefix(prefix + ".")
        roles[name] = known.get(suffix, suffix.rpartition(".")[2])
        if inside and (family is None or not family.folds):
            raise ValueError(
                f"layer {name}: AWQ does not know what makes the inputs of role {roles[name]!r} in this family, and "
                "folds no scale on a guess (`folds` in kdqat/models/roles.py): use GPTQ or MSEGrid"
            )
    return roles


def _refuse_static_ranges(layers: Mapping[str, QuantizedLayer], call: BlockCall) -> None:
    for name, layer in layers.items():
        if needs_range(layer.activation_fake_quantizer) or needs_range(layer.output_fake_quantizer):
            raise ValueError(
                f"layer {name}: AWQ rescales activations, and its static activation range is set before that: use "
                "dynamic ranges (dynamic: true), or GPTQ"
            )
    cached = [quantizer for cache in kv_caches(call.module).values() for quantizer in cache.quantizers().values()]
    if call.prefix and any(needs_range(quantizer) for quantizer in cached):
        raise ValueError(f"block {call.prefix}: AWQ rescales what a static KV cache has its range for: use KV8 or GPTQ")
