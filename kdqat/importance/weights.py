"""The weights of layers as scorers handle them: found by name, fake-quantized as a copy, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kdqat.quant import Fixed
from kdqat.quant.clipping import search_clipping
from kdqat.quant.experts import EXPERT_WEIGHTS, FakeQuantExperts
from kdqat.quant.kinds import kind_of
from kdqat.spec import LayerScheme

Start = Literal["rtn", "mse"]


class LayerWeight(NamedTuple):
    """A layer's weight, and the way to its matrix [O, I] and back."""

    name: str
    parameter: nn.Parameter
    as_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]

    @property
    def matrix(self) -> Tensor:
        """[O, I], without a graph."""
        return self.as_matrix(self.parameter.detach())


def find_weights(model: nn.Module, names: Iterable[str]) -> dict[str, LayerWeight]:
    """The weights of the layers called `names`, by name; experts' weights are named like parameters.

    Raises:
        ValueError: naming a layer that is not there or cannot be fake-quantized.
    """
    return {name: _find(model, name) for name in names}


def _find(model: nn.Module, name: str) -> LayerWeight:
    owner, _, part = name.rpartition(".")
    modules = dict(model.named_modules())
    if name not in modules and part in EXPERT_WEIGHTS and FakeQuantExperts.wraps(modules.get(owner, model)):
        weight = getattr(modules[owner], part)
        return LayerWeight(name, weight, lambda w: w.flatten(0, 1), lambda m: m.reshape(weight.shape))
    if name not in modules:
        raise ValueError(f"score: the model has no layer {name!r}")
    module: Any = modules[name]
    try:
        kind: Any = kind_of(module)
    except ValueError as error:
        raise ValueError(f"score: layer {name}: {error}") from None
    return LayerWeight(name, module.weight, lambda w: kind.as_matrix(module, w), lambda m: kind.from_matrix(module, m))


@torch.no_grad()
def quantized(weight: LayerWeight, scheme: LayerScheme, start: Start) -> Tensor:
    """The weight in its own shape as `scheme` stores it: scales from the range ("rtn") or of least error ("mse").

    Raises:
        ValueError: naming the layer, if the scheme does not fit.
    """
    assert scheme.weight is not None
    matrix = weight.matrix
    try:
        with torch.device(matrix.device):
            quantizer = Fixed(scheme.weight, matrix.shape)
        groups = quantizer.groups(matrix)
        if start == "mse":
            qparams = search_clipping(groups, quantizer.grid, quantizer.spec, num_steps=60, smallest=0.4)
        else:
            qparams = quantizer.initial_qparams(groups)
        quantizer.load_qparams(qparams)
    except ValueError as error:
        raise ValueError(f"score: layer {weight.name}: {error}") from None
    return weight.from_matrix(quantizer(matrix)).to(weight.parameter.dtype)


@contextmanager
def replaced(weights: Iterable[LayerWeight], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The weights hold `values` (by layer name) inside the block, and afterwards what they held before, bit for bit."""
    chosen = [weight for weight in weights if weight.name in values]
    before = [weight.parameter.detach().clone() for weight in chosen]
    try:
        with torch.no_grad():
            for weight in chosen:
                weight.parameter.copy_(values[weight.name])
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(chosen, before, strict=True):
                weight.parameter.copy_(old)


def check_start(who: str, start: Start) -> Start:
    """
    Raises:
        ValueError: for a word that is none of the two.
    """
    if start not in get_args(Start):
        raise ValueError(f"{who}: start is {' or '.join(get_args(Start))}, not {start!r}")
    return start
