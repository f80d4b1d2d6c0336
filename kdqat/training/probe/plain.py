"""Running a model as it is written: no compiled blocks, nothing recomputed, no dropout; all put back afterwards.

Hooks inside a compiled block would compile it anew, and inside a checkpointed one run twice. In evaluation mode neither
transformers nor `parallel.py` checkpoints, so the modules' `training` flags are all that says so. What a plan has as
`deploy_only` is on, as it will be in deployment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kdqat.models import SplitModel
from kdqat.models.positions import eager_masks_made_there
from kdqat.quant import FakeQuantLayer

_COMPILED = "_compiled_call_impl"  # where torch.compile in place leaves its code


@contextmanager
def plainly(split: SplitModel, *, eager_attention: bool = False) -> Iterator[None]:
    """Inside, `split` runs uncompiled, uncheckpointed and in evaluation mode; draws no random number.

    Args:
        eager_attention: attention that gives its weights away.
    """
    modules = list(split.modules())  # walking a model takes a millisecond
    training = [module for module in modules if module.training]
    compiled = [(module, module.__dict__.pop(_COMPILED)) for module in modules if _COMPILED in module.__dict__]
    config: Any = split.model.config
    attention = config._attn_implementation
    for module in training:
        module.training = False  # not .eval(), which calls every module's children again
    if eager_attention:
        split.use_eager_attention()
    try:
        with eager_masks_made_there():
            yield
    finally:
        if eager_attention:
            split.model.set_attn_implementation(attention)  # type: ignore[operator]
        for module, call in compiled:
            module.__dict__[_COMPILED] = call
        for module in training:
            module.training = True
        # of its root FSDP2 keeps what it gathered for a backward pass, and would compute the next step with it even if
        # the optimizer has moved the weights since
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def constant_weights(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the fake-quantized weights of `layers` are constants for autograd: gradients of outputs need no more."""
    chosen: list[Any] = list(dict.fromkeys(layer for layer in layers if isinstance(layer, FakeQuantLayer)))
    try:
        for layer in chosen:
            layer.fake_quantized_weight = torch.no_grad()(layer.fake_quantized_weight)
        yield
    finally:
        for layer in chosen:
            vars(layer).pop("fake_quantized_weight", None)  # the class has it


@contextmanager
def gathered(module: nn.Module) -> Iterator[bool]:
    """Inside, FSDP2's parameters of `module` (not of modules that are sharded themselves) are whole, on every rank;
    yields whether it is sharded at all."""
    sharded = module if isinstance(module, FSDPModule) else None
    if sharded is not None:
        sharded.unshard()
    try:
        yield sharded is not None
    finally:
        if sharded is not None:
            sharded.reshard()
