"""Hooks that keep what layers, blocks and attention answered in one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdqat.models import blocks_of
from kdqat.models.kv_cache import attention_modules
from kdqat.models.roles import block_prefix
from kdqat.quant import FakeQuantLayer
from kdqat.types import LayerRef


class Seen(NamedTuple):
    """What one pass answered, by full name."""

    outputs: dict[str, Tensor]  # of layers and blocks: [B, T, O]
    inputs: dict[str, Tensor]  # of layers, as their matmul takes them: [B, T, I]
    entropy: dict[str, Tensor]  # of attention modules, [B, heads, T] in nats


def block_refs(model: nn.Module) -> list[LayerRef]:
    """The blocks' own outputs as places in the tables, role "block"."""
    prefix = block_prefix(model)
    return [LayerRef(f"{prefix}{i}", i, "block", ()) for i in range(len(blocks_of(model)))]


def attention_refs(model: nn.Module) -> list[LayerRef]:
    """The attention modules as places in the tables, role "attention"."""
    return [LayerRef(name, i, "attention", ()) for i, name in enumerate(attention_modules(model))]


@contextmanager
def watched(
    model: nn.Module, layers: Collection[str], *, attention: bool = False, differentiable: bool = False
) -> Iterator[Seen]:
    """Keep what the modules `layers` of `model` and its blocks answer, detached unless `differentiable`.

    Args:
        attention: keep the entropy of attention weights, which eager attention gives away.
        differentiable: keep inputs of layers too, and make every output something to differentiate by, even where
            nothing in front of it is trained.
    """
    seen = Seen({}, {}, {})

    def keep(name: str, is_layer: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], answer: Any) -> Any:
            output = answer[0] if isinstance(answer, tuple) else answer
            if output.ndim != 3:  # not of every token: BERT's pooler
                return None
            if not differentiable or not is_layer:
                seen.outputs[name] = output.detach()
                return None
            seen.inputs[name] = _as_multiplied(module, args[0].detach())
            given, output = output, output if output.requires_grad else output.detach().requires_grad_()
            seen.outputs[name] = output
            return None if output is given else output

        return hook

    def keep_entropy(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
            if isinstance(answer, tuple) and len(answer) > 1 and isinstance(answer[1], Tensor):
                seen.entropy[name] = entropy(answer[1])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name, True)) for name in layers]
    for ref in block_refs(model):
        handles.append(model.get_submodule(ref.name).register_forward_hook(keep(ref.name, False)))
    if attention:
        for name, module in attention_modules(model).items():
            handles.append(module.register_forward_hook(keep_entropy(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def entropy(weights: Tensor) -> Tensor:
    """Of attention weights [B, heads, T, T], in nats: [B, heads, T], fp32."""
    return torch.special.entr(weights.detach().float()).sum(-1)


@torch.no_grad()
def _as_multiplied(module: nn.Module, x: Tensor) -> Tensor:
    rounds = isinstance(module, FakeQuantLayer) and module.activation_fake_quantizer is not None
    return module.quantized_input(x) if rounds else x  # type: ignore[operator]
