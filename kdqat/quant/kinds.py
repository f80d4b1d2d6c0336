"""Which fake-quantized layer there is for a plain one, and the matmul weights a module owns: the one list of kinds."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from kdqat.quant.conv import FakeQuantConv2d
from kdqat.quant.embedding import FakeQuantEmbedding
from kdqat.quant.experts import EXPERT_WEIGHTS, FakeQuantExperts
from kdqat.quant.layer import FakeQuantLayer
from kdqat.quant.linear import FakeQuantConv1D, FakeQuantLinear
from kdqat.quant.lora import LoraAdapter
from kdqat.quant.quantizer import FakeQuantizer

KINDS: tuple[type[FakeQuantLayer], ...] = (FakeQuantLinear, FakeQuantConv1D, FakeQuantConv2d, FakeQuantEmbedding)


def kind_of(module: nn.Module) -> type[FakeQuantLayer]:
    """The kind of fake-quantized layer that takes the place of `module`.

    Raises:
        ValueError: if there is none.
    """
    name = type(module).__name__
    if isinstance(module, FakeQuantLayer):
        raise ValueError("it is fake-quantized already; strip_fake_quant first")
    for kind in KINDS:
        if kind.wraps(module):
            return kind
        if kind.plain_class is not nn.Module and isinstance(module, kind.plain_class):
            raise ValueError(f"it is a {name} whose own forward would be lost; put it into `ignore`")
    raise ValueError(
        f"it is a {name}; linear layers, Conv1D, Conv2d, embeddings and the experts of Mixtral and Qwen-MoE can be "
        "fake-quantized; put it into `ignore`"
    )


def matmul_weights(name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The matmul weights that `module` itself owns, as a plan names them, with their shapes as matrices [O, I].

    A layer has one, under its own name: its largest parameter of 2 or more dimensions (in its own shape, if it is of no
    known kind). Experts have two, under the names of the parameters. Embeddings (a lookup; an lm_head tied to one is
    counted as the linear it is), norms, adapters and fake quantizers have none.
    """
    if isinstance(module, (nn.Embedding, FakeQuantizer, LoraAdapter)):
        return {}
    if isinstance(module, FakeQuantExperts) or FakeQuantExperts.wraps(module):
        prefix = f"{name}." if name else ""
        return {prefix + part: tuple(getattr(module, part).flatten(0, 1).shape) for part in EXPERT_WEIGHTS}
    if isinstance(module, FakeQuantLayer):
        return {name: tuple(module.matrix_shape)}
    weight: Any = getattr(module, "weight", None)
    for kind in KINDS:
        if kind.wraps(module):
            return {name: tuple(kind.as_matrix(module, weight).shape)}  # type: ignore[arg-type]
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.ndim >= 2]
    return {name: max(shapes, key=math.prod)} if shapes else {}
