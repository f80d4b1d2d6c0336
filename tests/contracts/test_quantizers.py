"""The quantizer contract (docs/architecture.md, section 6), for every quantizer in `kdqat.quant.quantizers`.

A new file in the package is found and imported; an import error fails. A quantizer with options worth testing gets
further rows in VARIANTS.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import kdqat.quant.quantizers
from kdqat.quant import LSQ, FakeQuantizer, Fixed
from kdqat.quant.functional import choose_qparams, dequantize
from kdqat.quant.grouping import from_groups, to_groups
from kdqat.types import QParams
from tests.quant.specs import SOME_GRIDS, make_spec, spec_id

SHAPE = torch.Size((6, 32))


def found_quantizers() -> list[type[FakeQuantizer]]:
    found: set[type[FakeQuantizer]] = set()
    for module in pkgutil.walk_packages(kdqat.quant.quantizers.__path__, "kdqat.quant.quantizers."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, FakeQuantizer) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


VARIANTS = {
    **{cls.__name__: cls for cls in found_quantizers()},
    "LSQ-zero-point": partial(LSQ, learn_zero_point=True),
    "LSQ-layer": partial(LSQ, gradient_scale="layer"),
    "LSQ-none": partial(LSQ, gradient_scale="none"),
}


def make(factory, spec) -> FakeQuantizer:
    """A quantizer for random weights, started from RTN's scales where it takes any."""
    quantizer = factory(spec, SHAPE)
    if quantizer.uses_stored_qparams:
        with torch.no_grad():
            groups = to_groups(weights(), spec)
            quantizer.load_qparams(choose_qparams(groups, quantizer.qmin, quantizer.qmax, spec, 0.8))
    return quantizer


def weights() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05


def fixed_copy(quantizer: FakeQuantizer, weight: torch.Tensor) -> Fixed:
    """What a reader of the export has: the stored qparams and nothing else."""
    stored = quantizer.stored_qparams(weight)
    reader = Fixed(quantizer.spec, SHAPE)
    reader.load_qparams(QParams(stored.scale.detach(), stored.zero_point.detach().expand_as(stored.scale)))
    return reader


every_quantizer = pytest.mark.parametrize("factory", VARIANTS.values(), ids=VARIANTS)
every_case = pytest.mark.parametrize(
    ("factory", "spec"),
    [
        pytest.param(factory, spec, id=f"{name}-{spec_id(spec)}")
        for name, factory in VARIANTS.items()
        for spec in SOME_GRIDS
        if name != "LSQ-zero-point" or not spec.symmetric
    ],
)


def test_the_walk_finds_the_quantizers():
    assert {"MinMax", "LSQ", "Fixed"} <= {cls.__name__ for cls in found_quantizers()}


@every_case
def test_state_is_complete_before_the_first_forward_and_loads_strictly(factory, spec):
    quantizer = make(factory, spec)
    shapes = {name: tensor.shape for name, tensor in quantizer.state_dict().items()}
    assert set(shapes) >= {"scale", "zero_point", "qmin", "qmax"}
    expected = quantizer(weights())
    assert {name: tensor.shape for name, tensor in quantizer.state_dict().items()} == shapes
    fresh = factory(spec, SHAPE)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(weights()), expected)


@every_case
def test_scales_have_a_dimension_fp32_and_the_shape_of_the_spec(factory, spec):
    quantizer = make(factory, spec)
    assert quantizer.scale.ndim >= 1 and quantizer.scale.dtype == quantizer.zero_point.dtype == torch.float32
    assert quantizer.scale.shape == quantizer.zero_point.shape == spec.qparam_shape(SHAPE)
    assert all(parameter.ndim >= 1 for parameter in quantizer.parameters())  # FSDP2 refuses scalar parameters
    assert quantizer.qmin.ndim == quantizer.qmax.ndim == 0
    assert {"qmin", "qmax"} <= {name for name, _ in quantizer.named_buffers()}


@every_case
def test_it_builds_on_the_meta_device_and_can_be_filled_there(factory, spec):
    quantizer = make(factory, spec)
    with torch.device("meta"):
        empty = factory(spec, SHAPE)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(quantizer.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(weights()), quantizer(weights()))


@every_case
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(factory, spec, twin):
    quantizer = make(factory, spec)
    other = twin(quantizer)
    assert torch.equal(other(weights()), quantizer(weights()))
    assert other.scale.data_ptr() != quantizer.scale.data_ptr()
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in quantizer.named_parameters()]


@every_case
def test_forward_is_pure(factory, spec):
    quantizer, weight = make(factory, spec), weights()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    first = quantizer.train()(weight)
    assert torch.equal(quantizer(weight), first) and torch.equal(quantizer.eval()(weight), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert torch.equal(weight, weights())


@every_case
def test_applying_it_twice_with_its_stored_qparams_equals_once(factory, spec):
    quantizer, weight = make(factory, spec), weights()
    once = quantizer(weight).detach()
    assert torch.equal(fixed_copy(quantizer, weight)(once), once)


@every_case
def test_exported_codes_dequantize_to_exactly_the_forward_value(factory, spec):
    quantizer, weight = make(factory, spec), weights()
    codes, (scale, zero_point) = quantizer.codes(weight), quantizer.stored_qparams(weight)
    assert codes.dtype == torch.int16
    assert codes.min() >= quantizer.qmin and codes.max() <= quantizer.qmax
    values = from_groups(dequantize(to_groups(codes.float(), spec), scale, zero_point))
    assert torch.equal(values, quantizer(weight))
    stored = scale.to(getattr(torch, spec.scale_dtype))
    assert torch.equal(stored.float(), scale) and torch.equal(zero_point, zero_point.round())
    assert torch.equal(fixed_copy(quantizer, weight).codes(weight), codes)


@every_case
def test_a_group_holds_at_most_two_to_the_bits_levels(factory, spec):
    values = to_groups(make(factory, spec)(weights()).detach(), spec)
    shared = values.reshape(1, -1) if spec.granularity == "tensor" else values.reshape(-1, values.shape[-1])
    for group in shared:
        assert 1 < group.unique().numel() <= 2**spec.bits or spec.bits == 1


@every_case
def test_gradients_of_input_and_parameters_are_finite_and_there(factory, spec):
    quantizer, weight = make(factory, spec), weights().requires_grad_()
    quantizer(weight).square().sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_case
@pytest.mark.parametrize("value", [0.0, 0.05, -0.05])
def test_a_zero_or_constant_group_gives_no_nan(factory, spec, value):
    quantizer, weight = make(factory, spec), torch.full(SHAPE, value, requires_grad=True)
    if quantizer.uses_stored_qparams:
        with torch.no_grad():
            groups = to_groups(weight, spec)
            quantizer.load_qparams(choose_qparams(groups, quantizer.qmin, quantizer.qmax, spec))
    out = quantizer(weight)
    out.sum().backward()
    assert out.isfinite().all() and weight.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters())
    close = 0.07 if spec.scale_rule == "absmax_half" else 0.01  # 7/7.5; the rounding of the stored scale
    torch.testing.assert_close(out, weight, rtol=close, atol=0)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weight_is_kept_and_the_grid_is_computed_in_fp32(factory, dtype):
    quantizer = make(factory, make_spec(4, "group", symmetric=False))
    weight = weights().to(dtype).requires_grad_()
    out = quantizer(weight)
    out.sum().backward()
    assert out.dtype == weight.grad.dtype == dtype
    assert torch.equal(out, quantizer(weight.float()).to(dtype))


@every_case
def test_it_compiles_whole_and_changing_bits_does_not_recompile(factory, spec):
    quantizer, weight = make(factory, spec), weights()
    torch._dynamo.reset()
    counter = CompileCounter()  # counts what it is given to compile, and runs it eagerly
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    for bits in (4, 3, 2, 8):
        quantizer.set_bits(bits)
        assert torch.equal(compiled(weight), quantizer(weight))
    assert counter.frame_count == 1


@every_quantizer
def test_fewer_bits_give_fewer_levels_and_the_codes_stay_in_range(factory):
    quantizer, weight = make(factory, make_spec(4, "channel", symmetric=False)), weights()
    for bits in (3, 2, 1):
        quantizer.set_bits(bits)
        codes = quantizer.codes(weight)
        assert codes.min() >= 0 and codes.max() <= 2**bits - 1
        assert all(row.unique().numel() <= 2**bits for row in quantizer(weight).detach())
