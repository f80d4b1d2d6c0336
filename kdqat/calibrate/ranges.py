"""Static activation ranges: where training (or an export right away) starts from.

Ranges are taken from a sample of the calibration text, by the spec's scale rule or by the clipping that loses least
(https://arxiv.org/abs/2004.09576, section 3.3, starts learned offsets so). Dynamic ranges need none; of those with a
second level (NVFP4) the global scale is calibrated, as engines store it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kdqat.calibrate.block_call import BlockCall
from kdqat.calibrate.statistics import InputSample
from kdqat.quant import FakeQuantizer, QuantizedLayer, full_precision, scales
from kdqat.quant.clipping import search_clipping
from kdqat.quant.kv import Observer, kv_caches
from kdqat.quant.ranges import choose_qparams

RangeMethod = Literal["minmax", "mse"]


def needs_range(quantizer: FakeQuantizer | None) -> bool:
    """Whether an activation quantizer stores something that only data can tell."""
    if quantizer is None:
        return False
    return quantizer.uses_stored_qparams or bool(scales.second_level_shapes(quantizer.spec.scale_dtype, (1,)))


def calibrate_ranges(
    call: BlockCall, layers: Mapping[str, QuantizedLayer], *, method: RangeMethod, max_tokens: int
) -> None:
    """Set the stored activation ranges of a block's layers, and of its KV cache, from what they see in full precision.

    Args:
        layers: of this block, by full name.
        method: "minmax" the spec's rule on the sampled range; "mse" the clipping with the least squared error.
        max_tokens: sampled rows a layer.

    Raises:
        ValueError: naming a layer that saw no token.
    """
    inputs = _samples(call, {n: layer.activation_fake_quantizer for n, layer in layers.items()}, max_tokens)
    outputs = _samples(call, {n: layer.output_fake_quantizer for n, layer in layers.items()}, max_tokens)
    caches = kv_caches(call.module) if call.prefix else {}
    cached = {name: _samples(call, cache.quantizers(), max_tokens) for name, cache in caches.items()}
    if not inputs and not outputs and not any(cached.values()):
        return
    on_input = {name: sample.update for name, (_, sample) in inputs.items()}
    on_output = {name: sample.update for name, (_, sample) in outputs.items()}
    try:
        for name, samples in cached.items():
            caches[name].observer = _observer(samples)
        with full_precision(call.module):
            call.run(on_input, on_output)
    finally:
        for cache in caches.values():
            cache.observer = None
    for samples in (inputs, outputs, *cached.values()):
        for name, (quantizer, sample) in samples.items():
            try:
                set_range(quantizer, sample.rows, method=method)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None


@torch.no_grad()
def set_range(quantizer: FakeQuantizer, rows: Tensor, *, method: RangeMethod) -> None:
    """Give a quantizer the range of `rows` [tokens, I]."""
    groups, grid, spec = quantizer.groups(rows), quantizer.grid, quantizer.spec
    if spec.dynamic:
        wanted = choose_qparams(groups, grid, spec)
        quantizer.load_second_level(scales.fit(spec.scale_dtype, wanted.scale, wanted.zero_point))
    elif method == "mse":
        quantizer.load_qparams(search_clipping(groups, grid, spec, num_steps=60, smallest=0.1))
    else:
        quantizer.load_qparams(choose_qparams(groups, grid, spec))


def _samples(
    call: BlockCall, quantizers: Mapping[str, FakeQuantizer | None], max_tokens: int
) -> dict[str, tuple[FakeQuantizer, InputSample]]:
    return {
        name: (quantizer, InputSample(max_tokens, call.num_tokens))
        for name, quantizer in quantizers.items()
        if quantizer is not None and needs_range(quantizer)
    }


def _observer(samples: Mapping[str, tuple[FakeQuantizer, InputSample]]) -> Observer:
    def observe(part: str, rows: Tensor) -> None:
        if part in samples:
            samples[part][1].update(rows)

    return observe
