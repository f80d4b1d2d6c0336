"""What fake quantization keeps for the backward pass, and that leaving it out changes no number."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kdqat.quant import LSQ, SEQ, FakeQuantConv1D, FakeQuantLinear, MinMax, QuEST
from kdqat.quant.lean import describe_ways, way_of
from kdqat.spec import LayerScheme, preset
from tests.contracts.test_quantizers import SHAPE, TAKES, VARIANTS, make, weights
from tests.quant import specs
from tests.quant.specs import spec_id

LAYERS = [
    (MinMax, "W4A16"),
    (partial(MinMax, ste="clipped"), "W4A16_G32"),
    (LSQ, "W4A16_G32"),
    (partial(LSQ, ste="trust"), "W3A16_G32"),
    (partial(LSQ, learn_zero_point=True), "W4A16_ASYM_G32"),
    (LSQ, "NVFP4_A16"),
    (LSQ, "GGUF_Q4_0"),
    (QuEST, "QUEST_W4A16"),
    (SEQ, "W2A16_HALF"),  # has arithmetic of its own
]


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass under bf16 autocast, beside parameters, buffers and x."""
    given = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    held = sum(kept.values())
    y.float().sum().backward()
    return held


@pytest.mark.parametrize(("quantizer", "name"), LAYERS, ids=lambda case: case if isinstance(case, str) else None)
def test_a_fake_quantized_linear_keeps_no_byte_more_than_a_linear(quantizer, name):
    plain, x = nn.Linear(128, 96), torch.randn(2, 24, 128, requires_grad=True)
    layer = FakeQuantLinear.wrap(plain, LayerScheme(weight=preset(name).weight), quantizer)
    assert kept_bytes(layer, x) == kept_bytes(plain, x) > 0


def test_composed_fake_quantization_keeps_much_more():
    plain, x = nn.Linear(128, 96), torch.randn(2, 24, 128)
    layer = FakeQuantLinear.wrap(plain, preset("W4A16_G32"), LSQ)
    fake_quantizer = layer.weight_fake_quantizer
    assert fake_quantizer is not None
    fake_quantizer.forward = fake_quantizer.composed  # type: ignore[method-assign]
    assert kept_bytes(layer, x) > kept_bytes(plain, x) + 128 * 96 * 4


@pytest.mark.parametrize(
    ("factory", "spec"),
    [
        pytest.param(factory, spec, id=f"{name}-{spec_id(spec)}")
        for name, factory in VARIANTS.items()
        for spec in TAKES.get(name, specs.SOME_GRIDS)
    ],
)
def test_values_are_those_of_the_composed_operations_and_gradients_agree(factory, spec):
    try:
        quantizer = make(factory, spec)
    except ValueError:
        pytest.skip("this quantizer takes no such grid")
    upstream, found = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), []
    for compute in (quantizer, lambda weight: quantizer.composed(weight, weight.dtype)):
        weight = weights().requires_grad_()
        quantizer.zero_grad(set_to_none=True)
        values = compute(weight)
        values.backward(upstream)
        found.append((values.detach(), weight.grad, [p.grad for p in quantizer.parameters()]))
    (values, of_weight, of_scales), (expected, weight_expected, scales_expected) = found
    assert torch.equal(values, expected)
    torch.testing.assert_close(of_weight, weight_expected, rtol=1e-4, atol=1e-6)
    for mine, other in zip(of_scales, scales_expected, strict=True):  # sums of many numbers that cancel
        assert (mine is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=float(1e-3 * other.abs().max()))


@pytest.mark.parametrize("name", ["W4A16_G32", "NVFP4_A16", "NF4"])
def test_the_autocast_dtype_is_what_a_cast_afterwards_gives(name):
    weight = torch.randn(16, 128)
    spec = preset(name).weight
    assert spec is not None
    quantizer = MinMax(spec, weight.shape)
    assert torch.equal(quantizer(weight, torch.bfloat16), quantizer(weight).to(torch.bfloat16))


def test_a_transposed_weight_gets_its_gradient_in_its_own_layout():
    from transformers.pytorch_utils import Conv1D

    plain = Conv1D(32, 64)
    layer = FakeQuantConv1D.wrap(plain, preset("W4A16_G32"), MinMax)
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (64, 32)


def test_the_way_taken_is_named():
    spec, shape = preset("W4A16_G32").weight, torch.Size((8, 64))
    assert way_of(LSQ(spec, shape), torch.device("cpu")) == "closed form"
    half = preset("W2A16_HALF").weight
    assert way_of(SEQ(half, shape), torch.device("cpu")) == "recomputed"


def test_the_log_counts_the_ways():
    model = nn.Sequential(*[FakeQuantLinear.wrap(nn.Linear(64, 8), preset("W4A8"), LSQ) for _ in range(2)])
    assert describe_ways(model, torch.device("cpu")) == "fake quantization: 4 by pure torch"


def test_a_subclass_with_a_range_of_its_own_is_asked_for_it_and_learns():
    class Shrunk(MinMax):
        def __init__(self, spec, shape):
            super().__init__(spec, shape, ste="clipped")
            self.share = nn.Parameter(torch.tensor([0.5]))

        def qparams(self, groups):
            wanted = super().qparams(groups)
            return wanted._replace(scale=wanted.scale * self.share)

    spec, weight = preset("W4A16_G32").weight, torch.randn(4, 64)
    quantizer = Shrunk(spec, weight.shape)
    values = quantizer(weight)
    assert not quantizer.finds_range and not torch.equal(values, MinMax(spec, weight.shape)(weight))
    values.square().sum().backward()
    assert quantizer.share.grad.abs() > 0


def test_a_subclass_of_a_method_that_reads_no_tensor_gets_the_groups_all_the_same():
    class Capped(LSQ):
        def qparams(self, groups):
            assert groups.shape == (4, 2, 32)
            return super().qparams(groups)

    spec, weight = preset("W4A16_G32").weight, torch.randn(4, 64)
    assert LSQ(spec, weight.shape).skips_groups
    Capped(spec, weight.shape)(weight)
