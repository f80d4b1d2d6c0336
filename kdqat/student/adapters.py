"""A student with LoRA adapters: putting them on, merging them, and what a merge would change.

Inside the fake quantizer, W <- W + s B A is exact: the very tensor that was quantized becomes the latent weight. An
adapter outside has no such place. Quantizing W + s B A anew gives other codes, and how many others is measured here.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch

from kdqat.models import select_layers
from kdqat.quant import FakeQuantConv1D, FakeQuantLayer, FakeQuantLinear, LoraAdapter
from kdqat.student.student import Student
from kdqat.types import LayerRef

log = logging.getLogger(__name__)


def attach_adapters(
    student: Student,
    *,
    roles: Collection[str] | None = None,
    blocks: Collection[int] | None = None,
    layers: Collection[str] | None = None,
    who: str,
    **settings: Any,
) -> int:
    """Give the chosen linear layers an adapter; a layer that has the very same one keeps it.

    Args:
        roles, blocks, layers: as `select_layers`; without any of them every linear layer of the blocks is chosen.
        who: asks, for the errors.
        settings: of `LoraAdapter`.

    Returns:
        How many layers are new.

    Raises:
        ValueError: naming the layer, if one that was asked for by role or name is not linear or tied, has another
            adapter, or the settings do not fit; then nothing is changed.
    """
    own = student.layers
    refs = student.refs
    asked = roles is not None or layers is not None
    if not asked and blocks is None:
        refs = [ref for ref in refs if ref.block is not None]
    chosen = select_layers(refs, roles=roles, blocks=blocks, layers=layers, who=who)
    refused = {ref.name: why for ref in chosen if (why := _why_not(student, ref))}
    for name, why in refused.items():
        if asked:
            raise ValueError(f"{who}: layer {name}: {why}; leave it out")
    if refused:
        log.warning("%s: %d layers get no adapter, e.g. %s: %s", who, len(refused), *next(iter(refused.items())))
    new: dict[str, LoraAdapter] = {}
    for name in (ref.name for ref in chosen if ref.name not in refused):
        layer = own[name]
        try:
            with torch.device(layer.weight.device):
                adapter = LoraAdapter(layer.matrix_shape, **settings)
        except ValueError as error:
            raise ValueError(f"{who}: layer {name}: {error}") from None
        if layer.adapter is None:
            new[name] = adapter
        elif layer.adapter.settings != adapter.settings:
            raise ValueError(f"{who}: layer {name} has an adapter already ({layer.adapter.extra_repr()})")
    if len({adapter.placement for adapter in (*student.adapters.values(), *new.values())}) > 1:
        raise ValueError(f"{who}: the adapters of a student are all inside or all outside, and it has others already")
    if len(refused) == len(chosen):
        raise ValueError(f"{who}: none of the chosen layers is linear")
    for name, adapter in new.items():
        adapter.draw(name)
        own[name].adapter = adapter.train(student.split.training)
    return len(new)


@torch.no_grad()
def merge_adapters(student: Student) -> dict[str, float]:
    """Add every adapter inside to its latent weight and take it off; those outside stay.

    Returns:
        By layer, the largest difference that this made to the fake-quantized weight: 0 where it was merged on the
        device that it was trained on, and nothing else is.
    """
    change = {}
    for name, layer in student.layers.items():
        if isinstance(layer, FakeQuantLayer) and layer.adapter is not None and layer.adapter.placement == "inside":
            before = layer.fake_quantized_weight().clone()
            layer.weight.copy_(layer.from_matrix(layer.latent_matrix()))
            layer.adapter = None
            change[name] = float((layer.fake_quantized_weight() - before).abs().max())
    return change


@torch.no_grad()
def merge_change(student: Student) -> dict[str, dict[str, float]]:
    """What quantizing W + s B A anew would change in a student whose adapters are outside, by role.

    Returns:
        role -> codes_changed, the share of stored codes that become others; sqnr_db, of Q(W + s B A) to
        Q(W) + s B A; layers, their number. Layers whose weight is not quantized are left out: they would merge exactly.
    """
    sums: dict[str, Any] = {}
    roles = {ref.name: ref.role for ref in student.refs}
    for name, layer in student.layers.items():
        quantizer, adapter = layer.weight_fake_quantizer, layer.adapter
        if quantizer is None or adapter is None or adapter.placement == "inside":
            continue
        latent = layer.as_matrix(layer.weight)
        merged, wanted = adapter.added_to(latent), layer.as_matrix(layer.dequantized_weight()).float()
        moved = quantizer.codes(merged) != quantizer.codes(latent)
        of_role = sums.setdefault(roles[name], Counter())
        of_role.update(layers=1, codes=latent.numel(), moved=int(moved.sum()))
        of_role["signal"] += float(wanted.square().sum())
        of_role["noise"] += float((quantizer(merged, torch.float32) - wanted).square().sum())
    return {
        role: {
            "layers": of_role["layers"],
            "codes_changed": of_role["moved"] / of_role["codes"],
            "sqnr_db": 10 * math.log10(of_role["signal"] / of_role["noise"]) if of_role["noise"] else math.inf,
        }
        for role, of_role in sums.items()
    }


def _why_not(student: Student, ref: LayerRef) -> str:
    """Why the layer can have no adapter; "" if it can."""
    layer = student.layers[ref.name]
    if not isinstance(layer, (FakeQuantLinear, FakeQuantConv1D)):
        return f"adapters are for linear layers, this is of {type(layer).__name__}"
    for name, module in student.model.named_modules():
        if name != ref.name and getattr(module, "weight", None) is layer.weight:
            return f"its weight is tied to {name}, which has to stay as it is"
    return ""
