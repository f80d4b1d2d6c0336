"""The quantizer contract (docs/extending/quantizer.md), for every quantizer in `kdqat.quant.quantizers`.

A new file in the package is found and imported; an import error fails. A quantizer with options worth testing gets
further rows in VARIANTS. What a quantizer takes is what its constructor does not refuse; TAKES says what that must be.
Activations and fresh processes have files of their own (tests/quant/test_quantizers_*.py).
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
from kdqat.quant import LSQ, SEQ, FakeQuantizer, Fixed, LearnedClipping, MSEClip
from kdqat.quant.formats import decode
from kdqat.quant.functional import quantize
from kdqat.quant.grouping import to_groups
from kdqat.quant.ranges import choose_qparams
from tests.quant import specs
from tests.quant.specs import constant_error, make_spec, spec_id

SHAPE = torch.Size((6, 32))
GRIDS = [*specs.SOME_GRIDS, *specs.NESTED_GRIDS]


def found_quantizers() -> list[type[FakeQuantizer]]:
    found: set[type[FakeQuantizer]] = set()
    for module in pkgutil.walk_packages(kdqat.quant.quantizers.__path__, "kdqat.quant.quantizers."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, FakeQuantizer) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


VARIANTS = {
    **{cls.__name__: cls for cls in found_quantizers()},
    "MSEClip": partial(MSEClip, num_steps=4, smallest=0.7),
    "LSQ-zero-point": partial(LSQ, learn_zero_point=True),
    "LSQ-layer": partial(LSQ, gradient_scale="layer"),
    "LSQ-none": partial(LSQ, gradient_scale="none"),
    "LSQ-trust": partial(LSQ, ste="trust"),
    "LSQ-attenuated": partial(LSQ, ste="attenuated"),
}
TAKES = {  # the quantizers that do not take every grid
    "SEQ": [s for s in GRIDS if s.format == "ternary" or s.zero_point == "half"],
    "QuEST": specs.QUEST_GRIDS,
    "AIMETRange": [s for s in GRIDS if s.number.kind == "integer" and s.zero_point in ("none", "integer")],
    "LSQ-zero-point": [s for s in GRIDS if not s.symmetric],
}


def make(factory, spec) -> FakeQuantizer:
    """A quantizer for random weights, started from RTN's scales where it takes any."""
    quantizer = factory(spec, SHAPE)
    if quantizer.uses_stored_qparams:
        with torch.no_grad():
            groups = quantizer.groups(weights())
            quantizer.load_qparams(choose_qparams(groups, quantizer.grid, spec, 0.6))
    return quantizer


def weights() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05


def fixed_copy(quantizer: FakeQuantizer, weight: torch.Tensor) -> Fixed:
    """What a reader of the export has: the stored qparams, their second level and nothing else."""
    reader = Fixed(quantizer.spec, SHAPE)
    reader.load_qparams(quantizer.stored_qparams(weight), quantizer.second_level(weight))
    return reader


def cases(grids_of):
    return [
        pytest.param(factory, spec, id=f"{name}-{spec_id(spec)}")
        for name, factory in VARIANTS.items()
        for spec in grids_of(name)
    ]


def compiled_grids(name: str) -> list:
    """Every format once, with LSQ, and the arithmetic of every quantizer; all pairs would take minutes."""
    takes = TAKES.get(name, GRIDS)
    if name in ("LSQ", "SEQ", "QuEST"):
        return takes
    chosen = [specs.INTEGER_GRIDS[7], specs.QUEST_GRIDS[1], specs.NESTED_GRIDS[0]]
    chosen += specs.FLOAT_GRIDS[-1:] if name == "MinMax" else []  # a live power of two follows the format's exponent
    return [s for s in takes if s in chosen]


every_quantizer = pytest.mark.parametrize(
    "factory", [VARIANTS[name] for name in VARIANTS if name not in TAKES], ids=[n for n in VARIANTS if n not in TAKES]
)
every_case = pytest.mark.parametrize(("factory", "spec"), cases(lambda name: TAKES.get(name, GRIDS)))


def test_the_walk_finds_the_quantizers_and_all_of_them_are_public():
    found = {cls.__name__ for cls in found_quantizers()}
    assert {"MinMax", "LSQ", "Fixed", "SEQ", "QuEST", "AIMETRange", "MSEClip", "LearnedClipping", "LSQPlus"} <= found
    assert found <= set(kdqat.quant.__all__)


@pytest.mark.parametrize("spec", GRIDS, ids=spec_id)
@pytest.mark.parametrize("name", TAKES)
def test_a_grid_that_a_quantizer_does_not_take_is_refused_with_a_remedy(name, spec):
    if spec in TAKES[name]:
        VARIANTS[name](spec, SHAPE)
    else:
        with pytest.raises(ValueError, match=r"use |, e\.g\. W4A16_ASYM_G64"):
            VARIANTS[name](spec, SHAPE)


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
    reader = fixed_copy(quantizer, weight)
    # as levels: a minifloat has two codes for zero
    assert torch.equal(decode(reader.codes(once), spec), decode(quantizer.codes(weight), spec))
    if spec.hadamard:  # the rotation there and back rounds in fp32
        torch.testing.assert_close(reader(once), once)
    else:
        assert torch.equal(reader(once), once)


@every_case
def test_exported_codes_dequantize_to_exactly_the_forward_value(factory, spec):
    quantizer, weight = make(factory, spec), weights()
    codes, stored = quantizer.codes(weight), quantizer.stored_qparams(weight)
    assert codes.dtype == torch.int16 and codes.shape == weight.shape
    if spec.number.kind == "integer":
        offset = quantizer.grid.offset
        assert codes.min() >= quantizer.qmin - offset and codes.max() <= quantizer.qmax - offset
    else:
        assert codes.min() >= 0 and codes.max() < len(spec.number.code_values())
    assert torch.equal(quantizer.values(codes, stored), quantizer(weight))
    if spec.scale_dtype in ("float32", "float16", "bfloat16"):
        assert torch.equal(stored.scale.to(getattr(torch, spec.scale_dtype)).float(), stored.scale)
    if spec.zero_point == "integer":
        assert torch.equal(stored.zero_point, stored.zero_point.round())
    reader = fixed_copy(quantizer, weight)
    assert all(torch.equal(a, b) for a, b in zip(reader.stored_qparams(weight), stored, strict=True))
    assert torch.equal(reader.codes(weight), codes) and torch.equal(reader(weight), quantizer(weight))


@every_case
def test_a_group_holds_at_most_two_to_the_bits_levels(factory, spec):
    quantizer = make(factory, spec)
    values = to_groups(quantizer(weights()).detach(), spec)
    if spec.hadamard:  # the levels lie in the rotated space
        groups = quantizer.groups(weights())
        values = quantize(groups, quantizer.stored_qparams(weights()), quantizer.grid, spec)
    shared = values.reshape(1, -1) if spec.granularity == "tensor" else values.reshape(-1, values.shape[-1])
    most = len(spec.levels) if spec.levels else round(2**spec.bits)
    for group in shared:
        assert 1 < group.unique().numel() <= most or spec.bits == 1


@every_case
def test_gradients_of_input_and_parameters_are_finite_and_there(factory, spec):
    quantizer, weight = make(factory, spec), weights().requires_grad_()
    quantizer(weight).backward(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    assert weight.grad.isfinite().all() and weight.grad.any()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_case
@pytest.mark.parametrize("value", [0.0, 0.05, -0.05])
def test_a_zero_or_constant_group_gives_no_nan(factory, spec, value):
    quantizer, weight = factory(spec, SHAPE), torch.full(SHAPE, value, requires_grad=True)
    if quantizer.uses_stored_qparams:
        with torch.no_grad():
            quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
    out = quantizer(weight)
    out.sum().backward()
    assert out.isfinite().all() and weight.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters())
    close = max(constant_error(spec), 0.34 * isinstance(quantizer, SEQ))  # SEQ: 1/4 or 1/3 below alpha
    close += 0.018 * isinstance(quantizer, LearnedClipping)  # sigmoid(4)
    torch.testing.assert_close(out, weight, rtol=close if value else 0, atol=1e-6)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weight_is_kept_and_the_grid_is_computed_in_fp32(factory, dtype):
    for spec in (make_spec(4, "group", symmetric=False), specs.NESTED_GRIDS[0], specs.CODEBOOK_GRIDS[0]):
        quantizer = make(factory, spec)
        weight = weights().to(dtype).requires_grad_()
        out = quantizer(weight)
        out.sum().backward()
        assert out.dtype == weight.grad.dtype == dtype
        assert torch.equal(out, quantizer(weight.float()).to(dtype))


@pytest.mark.parametrize(("factory", "spec"), cases(compiled_grids))
def test_it_compiles_whole_and_changing_bits_does_not_recompile(factory, spec):
    quantizer, weight = make(factory, spec), weights()
    torch._dynamo.reset()
    counter = CompileCounter()  # counts what it is given to compile, and runs it eagerly
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    assert torch.equal(compiled(weight), quantizer(weight))
    if spec.format.startswith("int"):
        for bits in (4, 3, 2, 8):
            quantizer.set_bits(bits)
            assert torch.equal(compiled(weight), quantizer(weight))
    elif spec.number.kind == "float":
        for name in ("e1m2", "e3m0", "e2m1", "e4m3"):
            quantizer.set_format(name)
            assert torch.equal(compiled(weight), quantizer(weight))
    else:
        with pytest.raises(ValueError, match=r"has one width|bits must be"):
            quantizer.set_bits(9)
    assert counter.frame_count == 1


@every_quantizer
def test_fewer_bits_give_fewer_levels_and_the_codes_stay_in_range(factory):
    quantizer, weight = make(factory, make_spec(4, "channel", symmetric=False)), weights()
    for bits in (3, 2, 1):
        quantizer.set_bits(bits)
        codes = quantizer.codes(weight)
        assert codes.min() >= 0 and codes.max() <= 2**bits - 1
        assert all(row.unique().numel() <= 2**bits for row in quantizer(weight).detach())
