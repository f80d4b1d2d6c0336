"""The initializer contract, for every initializer in `kdqat.initializers`; a new file is found and imported."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdqat.initializers
from kdqat.calibrate import BlockCall
from kdqat.initializers import RTN, Initializer, StoredScales
from kdqat.models.roles import Family, Fold
from kdqat.quant import LSQ, FakeQuantLinear, Fixed, MinMax
from kdqat.spec import LayerScheme
from kdqat.types import BlockView
from tests.quant.specs import NESTED_GRIDS, SOME_GRIDS, constant_error, spec_id


def found_initializers() -> list[type[Initializer]]:
    found: set[type[Initializer]] = set()
    for module in pkgutil.walk_packages(kdqat.initializers.__path__, "kdqat.initializers."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, Initializer) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


every_initializer = pytest.mark.parametrize("cls", found_initializers(), ids=lambda cls: cls.__name__)
every_grid = pytest.mark.parametrize("spec", SOME_GRIDS, ids=spec_id)


FEWER = {"SignRound": {"num_steps": 6}}  # what a class is built with, where its defaults take long


def build(cls) -> Initializer:
    return cls(**FEWER.get(cls.__name__, {}))


class StubCall:
    """Stands in for a BlockCall: a norm, and every layer behind it hears the same random inputs."""

    num_tokens, prefix, sequential, kept = 40, "block", False, None
    gather = BlockCall.gather
    family = Family("", {"a": "up", "b": "up"}, folds=(Fold("norm", ("a", "b", "plain")),))

    def __init__(self, layers: Mapping[str, FakeQuantLinear]) -> None:
        self.layers = layers
        self.module = nn.Module()
        self.module.norm = nn.Module()
        self.module.norm.weight = nn.Parameter(torch.ones(32))
        for name, layer in layers.items():
            self.module.add_module(name.removeprefix("block."), layer)
        self.inputs = [torch.randn(1, self.num_tokens, 32, generator=torch.Generator().manual_seed(1))]
        self.inputs[0][..., 5] *= 8  # as some features of real inputs are

    def run(self, on_input=None, on_output=None) -> None:
        for listener in (on_input or {}).values():
            listener(self.heard())
        for name, listener in (on_output or {}).items():
            listener(self.outputs(name))

    def heard(self) -> Tensor:
        return (self.inputs[0] * self.module.norm.weight.detach())[0]

    def outputs(self, name: str) -> Tensor:
        return F.linear(self.heard(), self.layers[name].weight.detach(), self.layers[name].bias.detach())

    def replay(self, i: int, hidden: Tensor | None = None) -> Tensor:
        hidden = (self.inputs[i] if hidden is None else hidden) * self.module.norm.weight
        return sum(layer(hidden) for layer in self.layers.values())

    def tokens(self, i: int, hidden: Tensor) -> Tensor:
        return hidden[0]


def make_block(spec, quantizer=LSQ) -> BlockView:
    torch.manual_seed(0)
    layers = {
        f"block.{name}": FakeQuantLinear.wrap(nn.Linear(32, 12), LayerScheme(weight=spec), quantizer)
        for name in ("a", "b")
    }
    layers["block.plain"] = FakeQuantLinear.wrap(nn.Linear(32, 12), LayerScheme(), quantizer)
    return BlockView(3, layers)


def block_for(cls, spec, quantizer=LSQ) -> BlockView:
    """A block as this initializer gets it: with a call only if it says that it needs one."""
    block = make_block(spec, quantizer)
    return replace(block, call=StubCall(block.layers)) if cls.needs_calibration else block


@functools.cache
def refusal(cls, spec) -> str:
    """What the initializer says against a grid, on harmless weights; empty if it takes it."""
    try:
        build(cls).initialize(block_for(cls, spec))
    except ValueError as error:
        return str(error)
    return ""


def taken_block(cls, spec, quantizer=LSQ) -> BlockView:
    if text := refusal(cls, spec):
        pytest.skip(text)
    return block_for(cls, spec, quantizer)


def a_grid_of(cls):
    return next(spec for spec in SOME_GRIDS if not refusal(cls, spec))


def weight_error(layer: FakeQuantLinear) -> float:
    return (layer.fake_quantized_weight() - layer.weight).square().mean().item()


def test_the_walk_finds_the_initializers_and_all_of_them_are_public():
    assert {"RTN", "MSEGrid"} <= {cls.__name__ for cls in found_initializers()} <= set(kdqat.initializers.__all__)


@every_initializer
def test_it_takes_at_least_three_grids_and_names_the_layer_whose_grid_it_refuses(cls):
    refusals = [refusal(cls, spec) for spec in SOME_GRIDS + NESTED_GRIDS]
    assert refusals.count("") >= 3
    assert all(text.startswith("layer block.a: ") and "use " in text for text in refusals if text)


@every_initializer
@every_grid
def test_every_layer_gets_finite_scales_that_fit_its_weights(cls, spec):
    block = taken_block(cls, spec)
    build(cls).initialize(block)
    for name in ("block.a", "block.b"):
        quantizer = block.layers[name].weight_fake_quantizer
        assert quantizer.scale.isfinite().all() and (quantizer.scale != 0).all() and not (quantizer.scale == 1).all()
        assert quantizer.scale.shape == spec.qparam_shape((12, 32))
        assert weight_error(block.layers[name]) < block.layers[name].weight.square().mean().item()


@every_initializer
@every_grid
def test_the_weight_error_is_not_far_from_rtns(cls, spec):
    block, rtn = taken_block(cls, spec), make_block(spec)
    build(cls).initialize(block)
    RTN().initialize(rtn)
    for name in ("block.a", "block.b"):
        assert weight_error(block.layers[name]) <= 2 * weight_error(rtn.layers[name])


@every_initializer
def test_what_it_writes_survives_in_the_parameters_that_are_there(cls):
    """An optimizer, a tie or DDP holds on to these objects: values change, objects do not."""
    block = block_for(cls, a_grid_of(cls))
    before = {id(tensor) for layer in block.layers.values() for tensor in layer.state_dict(keep_vars=True).values()}
    build(cls).initialize(block)
    after = {id(tensor) for layer in block.layers.values() for tensor in layer.state_dict(keep_vars=True).values()}
    assert before == after
    assert all(p.requires_grad and p.grad is None for layer in block.layers.values() for p in layer.parameters())


@every_initializer
def test_only_one_that_says_so_rewrites_latent_weights(cls):
    same = True
    for spec in SOME_GRIDS:
        if refusal(cls, spec):
            continue
        block, untouched = block_for(cls, spec), make_block(spec)
        initializer = build(cls)
        initializer.initialize(block)
        same &= all(torch.equal(block.layers[name].weight, untouched.layers[name].weight) for name in block.layers)
    assert same != initializer.rewrites_weights


@every_initializer
@every_grid
def test_it_is_repeatable(cls, spec):
    block, fresh = (taken_block(cls, spec, Fixed) for _ in range(2))
    states = []
    for _ in range(2):
        build(cls).initialize(block)
        states.append([t.clone() for layer in block.layers.values() for t in layer.state_dict().values()])
        for name, layer in block.layers.items():  # the scales stay as found: they must not count the second time
            layer.weight.data.copy_(fresh.layers[name].weight)
        if block.call is not None:
            block = replace(block, call=StubCall(block.layers))
    assert all(torch.equal(first, second) for first, second in zip(*states, strict=True))


@every_initializer
def test_for_live_ranges_it_either_has_nothing_to_set_or_names_the_layer(cls):
    block = block_for(cls, a_grid_of(cls), MinMax)
    if cls in (RTN, StoredScales):  # MinMax has RTN's ranges anyway, and nothing is stored here
        build(cls).initialize(block)
    else:
        with pytest.raises(ValueError, match=r"layer block\.a: .*MinMax .*(RTN initializer|Fixed)"):
            build(cls).initialize(block)
    assert (block.layers["block.a"].weight_fake_quantizer.scale == 1).all()


def rtn_of_a_constant(spec) -> Tensor:
    block = make_block(spec)
    block.layers["block.b"].weight.data.fill_(-0.3)
    RTN().initialize(block)
    return block.layers["block.b"].fake_quantized_weight().detach()


@every_initializer
@every_grid
def test_zero_and_constant_weights_are_survived(cls, spec):
    block = taken_block(cls, spec)
    with torch.no_grad():
        block.layers["block.a"].weight.zero_()
        block.layers["block.b"].weight.fill_(-0.3)
    build(cls).initialize(block)
    zeros = block.layers["block.a"].fake_quantized_weight()  # a grid without a zero has +- half its smallest step
    torch.testing.assert_close(zeros, torch.zeros(12, 32), rtol=0, atol=1e-6 if spec.zero_point == "half" else 0)
    constant = block.layers["block.b"].fake_quantized_weight()
    if cls().rewrites_weights:  # one error may be there to make good another: it is the outputs that count
        inputs = block.call.inputs[0][0]
        lost = block.call.heard() @ constant.T - inputs.sum(1, keepdim=True) * -0.3
        rounded = rtn_of_a_constant(spec)
        assert lost.norm() <= 1.01 * (inputs @ (rounded + 0.3).T).norm() + 1e-3 * inputs.norm()
        return
    torch.testing.assert_close(constant, torch.full((12, 32), -0.3), rtol=constant_error(spec), atol=1e-6)
