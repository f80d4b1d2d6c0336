"""The initializer contract, for every initializer in `kdqat.initializers`; a new file is found and imported."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import kdqat.initializers
from kdqat.initializers import RTN, Initializer
from kdqat.quant import LSQ, FakeQuantLinear, Fixed, MinMax
from kdqat.spec import LayerScheme
from kdqat.types import BlockView
from tests.quant.specs import SOME_GRIDS, make_spec, spec_id


def found_initializers() -> list[type[Initializer]]:
    found: set[type[Initializer]] = set()
    for module in pkgutil.walk_packages(kdqat.initializers.__path__, "kdqat.initializers."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, Initializer) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


every_initializer = pytest.mark.parametrize("cls", found_initializers(), ids=lambda cls: cls.__name__)
every_grid = pytest.mark.parametrize("spec", SOME_GRIDS, ids=spec_id)


def make_block(spec, quantizer=LSQ) -> BlockView:
    torch.manual_seed(0)
    layers = {
        f"block.{name}": FakeQuantLinear.from_linear(nn.Linear(32, 12), LayerScheme(weight=spec), quantizer)
        for name in ("a", "b")
    }
    layers["block.plain"] = FakeQuantLinear.from_linear(nn.Linear(32, 12), LayerScheme(), quantizer)
    return BlockView(3, layers)


def weight_error(layer: FakeQuantLinear) -> float:
    return (layer.fake_quantized_weight() - layer.weight).square().mean().item()


def test_the_walk_finds_the_initializers_and_all_of_them_are_public():
    assert {"RTN", "MSEGrid"} <= {cls.__name__ for cls in found_initializers()} <= set(kdqat.initializers.__all__)


@every_initializer
@every_grid
def test_every_layer_gets_finite_scales_that_fit_its_weights(cls, spec):
    block = make_block(spec)
    cls().initialize(block)
    for name in ("block.a", "block.b"):
        quantizer = block.layers[name].weight_fake_quantizer
        assert quantizer.scale.isfinite().all() and (quantizer.scale != 0).all() and not (quantizer.scale == 1).all()
        assert quantizer.scale.shape == spec.qparam_shape((12, 32))
        assert weight_error(block.layers[name]) < block.layers[name].weight.square().mean().item()


@every_initializer
@every_grid
def test_the_weight_error_is_not_far_from_rtns(cls, spec):
    block, rtn = make_block(spec), make_block(spec)
    cls().initialize(block)
    RTN().initialize(rtn)
    for name in ("block.a", "block.b"):
        assert weight_error(block.layers[name]) <= 2 * weight_error(rtn.layers[name])


@every_initializer
def test_what_it_writes_survives_in_the_parameters_that_are_there(cls):
    """An optimizer, a tie or DDP holds on to these objects: values change, objects do not."""
    block = make_block(make_spec(4))
    before = {id(tensor) for layer in block.layers.values() for tensor in layer.state_dict(keep_vars=True).values()}
    cls().initialize(block)
    after = {id(tensor) for layer in block.layers.values() for tensor in layer.state_dict(keep_vars=True).values()}
    assert before == after
    assert all(p.requires_grad and p.grad is None for layer in block.layers.values() for p in layer.parameters())


@every_initializer
def test_only_one_that_says_so_rewrites_latent_weights(cls):
    block, untouched = make_block(make_spec(4)), make_block(make_spec(4))
    cls().initialize(block)
    same = all(torch.equal(block.layers[name].weight, untouched.layers[name].weight) for name in block.layers)
    assert same != cls.rewrites_weights


@every_initializer
@every_grid
def test_it_is_repeatable(cls, spec):
    block = make_block(spec, Fixed)
    states = []
    for _ in range(2):
        cls().initialize(block)
        states.append([t.clone() for layer in block.layers.values() for t in layer.state_dict().values()])
    assert all(torch.equal(first, second) for first, second in zip(*states, strict=True))


@every_initializer
def test_for_live_ranges_it_either_has_nothing_to_set_or_names_the_layer(cls):
    block = make_block(make_spec(4), MinMax)
    if cls is RTN:  # MinMax has RTN's ranges anyway
        cls().initialize(block)
    else:
        with pytest.raises(ValueError, match=r"layer block\.a: MinMax recomputes .*RTN initializer"):
            cls().initialize(block)
    assert (block.layers["block.a"].weight_fake_quantizer.scale == 1).all()


@every_initializer
@every_grid
def test_zero_and_constant_weights_are_survived(cls, spec):
    block = make_block(spec)
    with torch.no_grad():
        block.layers["block.a"].weight.zero_()
        block.layers["block.b"].weight.fill_(-0.3)
    cls().initialize(block)
    assert torch.equal(block.layers["block.a"].fake_quantized_weight(), torch.zeros(12, 32))
    close = 0.07 if spec.scale_rule == "absmax_half" else 0.01  # 7/7.5; the rounding of the stored scale
    constant = block.layers["block.b"].fake_quantized_weight()
    torch.testing.assert_close(constant, torch.full((12, 32), -0.3), rtol=close, atol=0)
