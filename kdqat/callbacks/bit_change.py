"""Other bits for layers in the middle of a run: the code range in place, and scales for it.

Buffers are filled and parameters written where they lie, so that nothing is compiled anew and the optimizer keeps its
parameters. The scale is searched again on the live latent weights (the range with the least squared error, as `MSEGrid`
does): the range that was right for many bits is too wide for few, and so is the full one. docs/layerwise.md has
numbers, those that disagree too. The moments of a scale are of another scale, so they begin anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kdqat.models import SplitModel
from kdqat.quant import FakeQuantizer, QuantizedLayer
from kdqat.quant.clipping import search_clipping
from kdqat.training.probe.plain import gathered

NUM_STEPS, SMALLEST = 20, 0.4  # of the search: ranges from the full one down to a share of it


@torch.no_grad()
def change_bits(
    split: SplitModel,
    layers: Mapping[str, QuantizedLayer],
    wanted: Mapping[str, int],
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Give layers other bits; every rank computes the same, and under FSDP2 a block is gathered for it (collective).

    Args:
        layers: of the whole student, by name; tied ones share a quantizer, one of their names is enough.
        wanted: layer -> bits; its quantizer has an intN format.
        optimizers: the states of what these quantizers learn are dropped, and begin anew.
    """
    owners: dict[int, tuple[nn.Module, list[str]]] = {}
    owner_of = _owners(split)
    for name in wanted:
        owner = owner_of.get(id(layers[name].weight_fake_quantizer), split)
        owners.setdefault(id(owner), (owner, []))[1].append(name)
    for owner, names in owners.values():
        whole: dict[str, dict[str, Tensor]] = {}
        with gathered(owner) as sharded:
            for name in names:
                quantizer = _quantizer(layers[name])
                _fit(quantizer, layers[name], wanted[name])
                if sharded:  # what was written is let go with the block
                    whole[name] = {key: p.detach().clone() for key, p in quantizer.named_parameters()}
        for name in names:
            for key, parameter in _quantizer(layers[name]).named_parameters():
                if sharded:
                    _write(parameter, whole[name][key])
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)


def current_bits(quantizers: Mapping[str, FakeQuantizer]) -> dict[str, int]:
    """The bits in which integers of intN formats are computed now, read off the code ranges."""
    if not quantizers:
        return {}
    highest = torch.stack([quantizer.qmax for quantizer in quantizers.values()]).tolist()
    found = {}
    for (name, quantizer), high in zip(quantizers.items(), highest, strict=True):
        half = quantizer.spec.zero_point == "half"
        # highest code: 2^b - 1; 2^(b-1) - 1/2; 2^(b-1) - 1
        levels = high + 1 if not quantizer.spec.symmetric else 2 * high + (1 if half else 2)
        found[name] = round(levels).bit_length() - 1
    return found


def _fit(quantizer: FakeQuantizer, layer: QuantizedLayer, bits: int) -> None:
    quantizer.set_bits(bits)
    if not quantizer.uses_stored_qparams:
        return  # the next forward pass finds its range
    groups = quantizer.groups(layer.latent_matrix())
    if type(quantizer).initial_qparams is not FakeQuantizer.initial_qparams:
        quantizer.load_qparams(quantizer.initial_qparams(groups))  # a method with a start of its own (SEQ)
    else:
        quantizer.load_qparams(search_clipping(groups, quantizer.grid, quantizer.spec, NUM_STEPS, SMALLEST))


def _owners(split: SplitModel) -> dict[int, nn.Module]:
    """Quantizer (by id) -> the FSDP2 module that gathers it, the innermost one; none without FSDP2."""
    found: dict[int, nn.Module] = {}
    for module in split.modules():  # outer ones first
        if isinstance(module, FSDPModule):
            found |= {id(inner): module for inner in module.modules() if isinstance(inner, FakeQuantizer)}
    return found


def _write(parameter: nn.Parameter, whole: Tensor) -> None:
    """Write `whole` into a parameter, or this rank's part of it into its shard."""
    values: Any = whole
    if isinstance(parameter, DTensor):  # every rank has the same numbers: nothing is sent
        values = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def _quantizer(layer: QuantizedLayer) -> FakeQuantizer:
    assert layer.weight_fake_quantizer is not None
    return layer.weight_fake_quantizer
