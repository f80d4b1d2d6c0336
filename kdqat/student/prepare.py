"""Preparing a student: load, plan, swap, calibrate, initialize."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdqat.allocate import BitAllocator
from kdqat.calibrate import (
    BlockCall,
    Calibration,
    KeptStatistics,
    calibrate_ranges,
    needs_range,
    stream_blocks,
    text_digest,
    visiting,
)
from kdqat.initializers import Initializer
from kdqat.models import ModelSource, SplitModel, apply_kv_cache, block_prefix, blocks_of, plannable_refs
from kdqat.quant import (
    FakeQuantizer,
    QuantizedLayer,
    QuantizerFactory,
    apply_plan,
    default_activation_quantizer,
    fake_quant_layers,
    measure_coverage,
    require_coverage,
)
from kdqat.quant.kv import kv_caches
from kdqat.spec import LayerScheme, QuantPlan
from kdqat.student.student import Student
from kdqat.types import Batch, BlockView

log = logging.getLogger(__name__)


def prepare_student(
    source: ModelSource,
    allocator: BitAllocator,
    quantizer: QuantizerFactory,
    initializer: Initializer,
    *,
    activation_quantizer: QuantizerFactory | None = None,
    calibration: Calibration | None = None,
    split: SplitModel | None = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
) -> Student:
    """Load, plan, swap, calibrate, initialize.

    Args:
        activation_quantizer: of inputs and outputs; None: MinMax for dynamic ranges, LSQPlus for static ones.
        calibration: text for an initializer that needs it, and for static activation ranges.
        split, tokenizer: the model and tokenizer of `source`, where they are loaded already; the model is changed.
        device: where a block is calibrated and initialized in its turn, the model staying where it is; None: there.

    Raises:
        ValueError: if the model cannot be had, the plan does not fit, matmul weights would be left out unasked, or
            calibration is needed and there is none.
    """
    split = split if split is not None else SplitModel(source.load_model())
    tokenizer = tokenizer if tokenizer is not None else source.load_tokenizer()
    plan = allocator.allocate(plannable_refs(split.model))
    install_plan(split.model, plan, quantizer, activation_quantizer)
    coverage = measure_coverage(split.model, set(plan.ignored).__contains__)
    require_coverage(coverage)
    ranges = [quantizer for quantizer in _activation_quantizers(split.model) if needs_range(quantizer)]
    needed = initializer.needs_calibration or any(quantizer.uses_stored_qparams for quantizer in ranges)
    if needed and calibration is None:
        raise ValueError(
            "model.calibration is missing: static activation ranges (and some initializers) are set on text, e.g. "
            "calibration: {text: python_docs:train}; dynamic ranges (dynamic: true) need none"
        )
    if ranges and calibration is None:
        log.info("activations keep a global scale of 1; model.calibration sets it on text, as engines store it")
    calls: Iterable[BlockCall | None] = repeat(None)
    kept = None
    if calibration is not None and (needed or ranges):
        batches = calibration.batches(tokenizer)
        kept = _kept(calibration, source, batches, initializer)
        calls = stream_blocks(split, batches, sequential=initializer.sequential, device=device, kept=kept)
    for view in block_views(split.model, calls):
        if view.call is not None and calibration is not None:
            calibrate_ranges(view.call, view.layers, method=calibration.ranges, max_tokens=calibration.max_tokens)
        with visiting(_modules(split.model, view), device if view.call is None else None):
            initializer.initialize(view)
    if kept is not None and not kept.used:
        log.info("calibration.keep: %s counts nothing that is kept", type(initializer).__name__)
    plan = replace(plan, layers={name: _as_built(layer, plan[name]) for name, layer in _planned(split.model, plan)})
    student = Student(split, tokenizer, source, plan, coverage)
    bits = student.summary()["average_bits"]
    log.info("plan: %d layers, %.3f bits a weight counted with scales; %s", len(plan), bits, coverage)
    return student


def _kept(
    calibration: Calibration, source: ModelSource, batches: Sequence[Batch], initializer: Initializer
) -> KeptStatistics | None:
    if calibration.keep is None:
        return None
    if initializer.sequential:
        name = type(initializer).__name__
        log.info("calibration.keep: %s hears what its own quantized blocks give; nothing is kept or read", name)
        return None
    about = {"model": source.fingerprint(), "dtype": source.dtype, "text": text_digest(batches)}
    return KeptStatistics(Path(calibration.keep), **about)


def install_plan(
    model: nn.Module, plan: QuantPlan, quantizer: QuantizerFactory, activation_quantizer: QuantizerFactory | None
) -> None:
    """Put the plan's fake quantizers into the model: layers and KV cache."""
    activation_quantizer = activation_quantizer if activation_quantizer is not None else default_activation_quantizer
    apply_kv_cache(model, plan, activation_quantizer)
    apply_plan(model, plan, quantizer, activation_quantizer)


def block_views(model: nn.Module, calls: Iterable[BlockCall | None]) -> Iterator[BlockView]:
    """The fake-quantized layers of `model` block by block, each with its call; what lies outside the blocks comes last.

    Args:
        calls: one for each block and one for the outside, in order; or None again and again.
    """
    prefix = block_prefix(model)
    views: dict[int | None, dict[str, QuantizedLayer]] = {i: {} for i in range(len(blocks_of(model)))}
    views[None] = {}
    for name, layer in fake_quant_layers(model).items():
        index = int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None
        views[index][name] = layer
    for (index, layers), call in zip(views.items(), calls, strict=False):
        if layers or call is not None:
            yield BlockView(index, layers, call)


def _modules(model: nn.Module, view: BlockView) -> list[nn.Module]:
    """What holds the view's layers: its block, or the layers themselves."""
    if view.index is not None:
        return [blocks_of(model)[view.index]]
    return [layer for layer in view.layers.values() if isinstance(layer, nn.Module)]


def _activation_quantizers(model: nn.Module) -> list[FakeQuantizer]:
    layers = fake_quant_layers(model).values()
    found = [q for layer in layers for q in (layer.activation_fake_quantizer, layer.output_fake_quantizer)]
    found += [quantizer for cache in kv_caches(model).values() for quantizer in cache.quantizers().values()]
    return [quantizer for quantizer in found if quantizer is not None]


def _planned(model: nn.Module, plan: QuantPlan) -> list[tuple[str, QuantizedLayer]]:
    layers = fake_quant_layers(model)
    return [(name, layers[name]) for name in plan]


def _as_built(layer: QuantizedLayer, scheme: LayerScheme) -> LayerScheme:
    """The scheme with the formats its quantizers have now: a search may have chosen others."""
    quantizers = {kind: getattr(layer, f"{kind}_fake_quantizer") for kind in ("weight", "activation", "output")}
    return replace(scheme, **{kind: quantizer.spec for kind, quantizer in quantizers.items() if quantizer is not None})
