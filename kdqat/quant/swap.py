"""Put a plan into a model and take it out again: the two directions everything else builds on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from kdqat.quant.linear import FakeQuantLinear
from kdqat.quant.quantizer import QuantizerFactory
from kdqat.spec import QuantPlan

M = TypeVar("M", bound=nn.Module)


def apply_plan(model: M, plan: QuantPlan, quantizer: QuantizerFactory) -> M:
    """Swap every planned nn.Linear for a FakeQuantLinear; Parameter objects are kept, so ties hold.

    Everything is checked before the first swap: on an error the model is untouched.

    Returns:
        The model; the swapped layer itself if the model *is* the planned layer (name "").

    Raises:
        ValueError: naming the layer, if it does not exist, is no nn.Linear, its width or the quantizer does not fit the
            spec, or its weight is shared with a module that the plan leaves in full precision.
    """
    modules = dict(model.named_modules())
    for name, scheme in plan.items():
        layer = modules.get(name)
        if layer is None:
            raise ValueError(f"plan: the model has no layer {name!r}; was the plan made for another model?")
        if isinstance(layer, FakeQuantLinear):
            raise ValueError(f"plan: {name!r} is fake-quantized already; strip_fake_quant first")
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"plan: {name!r} is a {type(layer).__name__}; only nn.Linear can be fake-quantized")
        if type(layer).forward is not nn.Linear.forward:
            raise ValueError(f"plan: {name!r} is a {type(layer).__name__} whose own forward would be lost; ignore it")
        if scheme.weight is not None:
            try:
                scheme.weight.qparam_shape(layer.weight.shape)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None
            _refuse_half_tied(name, layer, modules, plan)
    swapped = {}
    for name, scheme in plan.items():
        try:
            swapped[name] = FakeQuantLinear.from_linear(modules[name], scheme, quantizer)
        except ValueError as error:  # a quantizer that refuses the spec
            raise ValueError(f"layer {name}: {error}") from None
    for name, layer in swapped.items():
        if name == "":
            return layer  # type: ignore[return-value]
        model.set_submodule(name, layer)
    return model


def strip_fake_quant(model: M) -> M:
    """Replace every FakeQuantLinear by a plain nn.Linear that holds the fake-quantized weight; returns the model."""
    for name, layer in fake_quant_layers(model).items():
        if name == "":
            return layer.to_linear()  # type: ignore[return-value]
        model.set_submodule(name, layer.to_linear())
    return model


def fake_quant_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """All fake-quantized layers by full name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Switch fake quantization off inside the block: the model computes with its latent weights."""
    layers = fake_quant_layers(model).values()
    before = [layer.fake_quantize for layer in layers]
    for layer in layers:
        layer.fake_quantize = False
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.fake_quantize = state


def _refuse_half_tied(name: str, layer: nn.Linear, modules: dict[str, nn.Module], plan: QuantPlan) -> None:
    for other, module in modules.items():
        planned = other in plan and plan[other].weight is not None
        if other != name and getattr(module, "weight", None) is layer.weight and not planned:
            raise ValueError(
                f"layer {name}: its weight is tied to {other}, which stays in full precision; leave {name} "
                "out of the plan (ignore: [lm_head]) or untie the weights before (tie_word_embeddings: false)"
            )
