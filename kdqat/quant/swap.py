"""Put a plan into a model and take it out again: the two directions everything else builds on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from torch import nn

from kdqat.quant.experts import EXPERT_WEIGHTS, ExpertWeight, FakeQuantExperts
from kdqat.quant.kinds import kind_of
from kdqat.quant.layer import FakeQuantLayer, default_activation_quantizer
from kdqat.quant.quantizer import QuantizerFactory
from kdqat.spec import LayerScheme, QuantPlan

M = TypeVar("M", bound=nn.Module)
QuantizedLayer: TypeAlias = FakeQuantLayer | ExpertWeight


def apply_plan(
    model: M,
    plan: QuantPlan,
    quantizer: QuantizerFactory,
    activation_quantizer: QuantizerFactory = default_activation_quantizer,
) -> M:
    """Swap every planned layer for its fake-quantized kind; Parameter objects are kept, so ties hold.

    Everything is checked before the first swap: on an error the model is untouched. Layers that share one weight
    share its fake quantizer too: it is stored once.

    Returns:
        The model; the swapped layer itself if the model *is* the planned layer (name "").

    Raises:
        ValueError: naming the layer, if it does not exist, cannot be fake-quantized, its width or the quantizer does
            not fit the spec, or its weight is shared with a module that the plan treats otherwise.
    """
    modules = dict(model.named_modules())
    experts: dict[str, dict[str, LayerScheme]] = {}
    kinds: dict[str, type[FakeQuantLayer]] = {}
    for name, scheme in plan.items():
        owner, _, part = name.rpartition(".")
        if name not in modules and part in EXPERT_WEIGHTS and FakeQuantExperts.wraps(modules.get(owner, model)):
            experts.setdefault(owner, {})[part] = scheme
            continue
        if name not in modules:
            raise ValueError(f"plan: the model has no layer {name!r}; was the plan made for another model?")
        with _naming(name):
            kinds[name] = kind_of(modules[name])
        if scheme.weight is not None:
            _refuse_half_tied(name, modules, plan)
    swapped: dict[str, nn.Module] = {}
    for name, kind in kinds.items():
        with _naming(name):
            swapped[name] = kind.wrap(modules[name], plan[name], quantizer, activation_quantizer, plan.deploy_only)
    for name, schemes in experts.items():
        with _naming(name):
            swapped[name] = FakeQuantExperts.wrap(
                modules[name], schemes, quantizer, activation_quantizer, plan.deploy_only
            )
    _share_quantizers(swapped)
    for name, layer in swapped.items():
        if name == "":
            return layer  # type: ignore[return-value]
        model.set_submodule(name, layer)
    return model


def strip_fake_quant(model: M) -> M:
    """Replace every fake-quantized layer by a plain one that holds the fake-quantized weight; returns the model."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (FakeQuantLayer, FakeQuantExperts))]
    plain = {name: module.unwrap() for name, module in found}
    shared: dict[int, nn.Parameter] = {}
    for name, module in found:  # what was tied stays tied
        if isinstance(module, FakeQuantLayer):
            plain[name].weight = shared.setdefault(id(module.weight), plain[name].weight)  # type: ignore[arg-type]
    for name, layer in plain.items():
        if name == "":
            return layer  # type: ignore[return-value]
        model.set_submodule(name, layer)
    return model


def fake_quant_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """All fake-quantized layers by full name, in module order; each weight of an experts module counts as one."""
    layers: dict[str, QuantizedLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLayer):
            layers[name] = module
        elif isinstance(module, FakeQuantExperts):
            for part in EXPERT_WEIGHTS:
                layers[f"{name}.{part}" if name else part] = module.part(part)
    return layers


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Switch fake quantization off inside the block: the model computes with its latent weights."""
    layers = [m for m in model.modules() if hasattr(m, "fake_quantize") and isinstance(m.fake_quantize, bool)]
    before = [layer.fake_quantize for layer in layers]
    for layer in layers:
        layer.fake_quantize = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.fake_quantize = state


def _refuse_half_tied(name: str, modules: dict[str, nn.Module], plan: QuantPlan) -> None:
    for other, module in modules.items():
        if other == name or getattr(module, "weight", None) is not modules[name].weight:
            continue
        if other not in plan or plan[other].weight is None:
            raise ValueError(
                f"layer {name}: its weight is tied to {other}, which stays in full precision; leave {name} out of the "
                f"plan (ignore: [lm_head]), plan both (embeddings: ...), or untie them (tie_word_embeddings: false)"
            )
        if plan[other].weight != plan[name].weight:
            raise ValueError(f"layer {name}: its weight is tied to {other}; both must have the same weight scheme")


def _share_quantizers(swapped: dict[str, nn.Module]) -> None:
    first: dict[int, FakeQuantLayer] = {}
    for layer in swapped.values():
        if isinstance(layer, FakeQuantLayer):
            owner = first.setdefault(id(layer.weight), layer)
            layer.weight_fake_quantizer = owner.weight_fake_quantizer


class _naming:
    """Puts the layer's name in front of what a spec or a quantizer refuses."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"layer {self.name}: {error}") from None
