"""The Triton kernels compute what the pure functions do.

On CUDA by `pytest -m gpu`; elsewhere Triton's interpreter runs them on the CPU, where triton is installed (the dev
extra has it on Linux). The interpreter truncates to bf16 instead of rounding, so bf16 is left to the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from kdqat.quant import LSQ, FakeQuantizer, FakeQuantLinear, LSQPlus, MinMax, QuEST, kernels
from kdqat.quant.lean import way_of
from kdqat.spec import preset
from tests.contracts.test_quantizers import VARIANTS
from tests.quant import specs
from tests.quant.specs import spec_id

CPU = pytest.param("cpu", marks=pytest.mark.skipif(not kernels.AVAILABLE, reason="triton is not installed"))
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = torch.Size((6, 32))
METHODS = {name: VARIANTS[name] for name in ("LSQ", "MinMax", "LSQ-zero-point", "LSQ-trust", "LSQ-attenuated")}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Every test would be one more version of the same code, and eight are the limit."""
    torch._dynamo.reset()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tests/conftest.py chose no interpreter: there is a GPU")
        monkeypatch.setattr(kernels, "DEVICES", ("cpu", "cuda"))
    yield torch.device(request.param)


def started(factory, spec, tensor: torch.Tensor) -> FakeQuantizer:
    """A quantizer for `tensor`; scales that are stored start at 0.6 of the range, so that something is clipped."""
    quantizer: FakeQuantizer = factory(spec, tensor.shape).to(tensor.device)
    if quantizer.uses_stored_qparams:
        start = quantizer.initial_qparams(quantizer.groups(tensor))
        quantizer.load_qparams(start._replace(scale=start.scale * 0.6))
    return quantizer


def both_ways(quantizer: FakeQuantizer, tensor: torch.Tensor, dtype: torch.dtype) -> list[tuple]:
    """(values, gradient of the tensor, gradients of the parameters): of the kernels, and composed."""
    found = []
    upstream = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.device, dtype)
    for compute in (quantizer, quantizer.composed):
        leaf = tensor.clone().requires_grad_()
        quantizer.zero_grad(set_to_none=True)
        values = compute(leaf, dtype)
        values.backward(upstream)
        found.append((values.detach(), leaf.grad, [p.grad for p in quantizer.parameters()]))
    return found


def require_alike(quantizer: FakeQuantizer, tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert way_of(quantizer, tensor.device) == "fused"
    (values, of_tensor, of_scales), (expected, tensor_expected, scales_expected) = both_ways(quantizer, tensor, dtype)
    assert torch.equal(values, expected)
    torch.testing.assert_close(of_tensor, tensor_expected, rtol=1e-4, atol=1e-6)
    for mine, other in zip(of_scales, scales_expected, strict=True):  # sums of numbers that cancel, in another order
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=float(1e-3 * other.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        pytest.param(name, spec, id=f"{name}-{spec_id(spec)}")
        for name in METHODS
        for spec in [*specs.SOME_GRIDS, *specs.NESTED_GRIDS]
        if name != "LSQ-zero-point" or not spec.symmetric
    ],
)
def test_values_are_equal_bit_for_bit_and_gradients_agree(name, spec, device):
    if device.type == "cpu" and spec.scale_dtype == "bfloat16":
        pytest.skip("the interpreter truncates to bf16")
    weight = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05).to(device)
    quantizer = started(METHODS[name], spec, weight)
    if way_of(quantizer, device) != "fused":
        pytest.skip("pure functions are what it gets, by design")
    require_alike(quantizer, weight)


@pytest.mark.parametrize("width", [48, 96, 576, 1000])
@pytest.mark.parametrize("method", [LSQ, MinMax, partial(MinMax, ste="clipped")])
def test_widths_that_are_no_power_of_two_and_groups_of_zeros(width, method, device):
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(2)).to(device)
    weight[1] = 0
    require_alike(started(method, preset("W4A16").weight, weight), weight)


@pytest.mark.parametrize("name", ["W8A8", "W4A4_G64", "MXFP4", "FP8"])
def test_activations_are_rounded_token_by_token(name, device):
    spec = preset(name).activation
    assert spec is not None
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3)).to(device)
    require_alike(MinMax(spec, torch.Size((1, 64))).to(device), x)


def test_static_activations_have_one_scale_for_the_tensor(device):
    spec = preset("W8A8_STATIC").activation
    assert spec is not None
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3)).to(device)
    quantizer = LSQPlus(spec, torch.Size((1, 64))).to(device)
    with torch.no_grad():
        quantizer.scale.fill_(0.02)
    require_alike(quantizer, x)


def test_a_rotated_quantizer_uses_them_between_its_rotations(device):
    spec = preset("QUEST_W4A16").weight
    assert spec is not None
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(4)).to(device)
    require_alike(QuEST(spec, weight.shape).to(device), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["W4A16", "W4A16_G128", "W4A16_ASYM_G128", "MXFP4", "NVFP4_A16", "NF4", "GGUF_Q4_0"])
@pytest.mark.parametrize("method", [LSQ, MinMax])
def test_bf16_out_of_a_large_weight_under_autocast_and_compile(name, method):
    spec = preset(name).weight
    assert spec is not None
    linear = torch.nn.Linear(2048, 1024, bias=False, device="cuda")
    layer = FakeQuantLinear.wrap(linear, preset(name), method)
    quantizer = layer.weight_fake_quantizer
    assert quantizer is not None
    if quantizer.uses_stored_qparams:
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(linear.weight.detach())))
    require_alike(quantizer, linear.weight.detach(), torch.bfloat16)
    x, found = torch.randn(64, 2048, device="cuda"), []
    for compute in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = compute(x)
        y.float().square().sum().backward()
        found.append((y.detach(), layer.weight.grad.clone(), [p.grad.clone() for p in quantizer.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-1)


@pytest.mark.gpu
def test_a_bit_schedule_recompiles_nothing():
    from torch._dynamo.testing import CompileCounter

    spec = preset("W4A16_G128").weight
    assert spec is not None
    quantizer, counter = LSQ(spec, torch.Size((64, 256))).cuda(), CompileCounter()
    compiled = torch.compile(quantizer, backend=counter)
    weight = torch.randn(64, 256, device="cuda")
    levels = []
    for bits in (4, 3, 2, 8):
        quantizer.set_bits(bits)
        levels.append(compiled(weight)[0, :128].unique().numel())
    assert counter.frame_count == 1 and levels[3] > levels[0] > levels[1] > levels[2]


@pytest.mark.parametrize("what", ["weight", "scale", "zero point"])
def test_what_is_not_a_number_stays_none(what, device):
    spec = preset("W4A16_ASYM_G32").weight
    assert spec is not None
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(device)
    quantizer = started(partial(LSQ, learn_zero_point=True), spec, weight)
    with torch.no_grad():
        {"weight": weight, "scale": quantizer.scale, "zero point": quantizer.zero_point}[what][1, 0] = torch.nan
    assert way_of(quantizer, device) == "fused"
    values, expected = quantizer(weight), quantizer.composed(weight, weight.dtype)
    assert expected[1].isnan().any() and torch.equal(values.isnan(), expected.isnan())


def test_a_tensor_without_values_launches_nothing(device, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kdqat.quant.kernels import ops

    spec = preset("W4A16_G32").weight
    assert spec is not None
    monkeypatch.setattr(ops, "_launch", None)
    monkeypatch.setattr(ops, "fake_quantize_op", lambda x, *_: torch.empty_like(x, dtype=_[-1]))
    quantizer = MinMax(spec, torch.Size((8, 64))).to(device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values = quantizer(torch.empty(8, 64, device=device), torch.bfloat16)
    assert values.shape == (8, 64) and values.dtype == torch.bfloat16
