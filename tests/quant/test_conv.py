"""FakeQuantConv2d: a channel is an output channel, a group lies along a filter, a token of activations is a pixel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdqat.initializers import RTN
from kdqat.quant import LSQ, LSQPlus, MinMax, apply_plan, fake_quant_layers, full_precision, strip_fake_quant
from kdqat.quant.conv import FakeQuantConv2d
from kdqat.quant.coverage import measure_coverage
from kdqat.spec import LayerScheme, QuantPlan, QuantSpec
from kdqat.types import BlockView
from tests.quant.specs import make_spec

W4 = LayerScheme(weight=make_spec(4))
VARIANTS = {
    "plain": {"kernel_size": 3},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": (1, 3), "groups": 8, "bias": False},
    "strided": {"kernel_size": 2, "stride": 2, "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}
every_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)


def conv(**kwargs) -> nn.Conv2d:
    """8 channels in, 16 out, each filter with a range of its own."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, **kwargs)
    layer.weight.data.mul_(torch.linspace(0.5, 2, 16).reshape(-1, 1, 1, 1))
    return layer


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 7, 6)), generator=torch.Generator().manual_seed(1))


def absmax_round(x: Tensor, dims, qmax: int) -> Tensor:
    scale = x.abs().amax(dims, keepdim=True) / qmax
    return (x / scale).round() * scale


@torch.no_grad()
@every_variant
def test_it_convolves_with_one_scale_for_each_filter(kwargs):
    plain = conv(**kwargs)
    ours = FakeQuantConv2d.wrap(conv(**kwargs), W4, MinMax)
    with full_precision(nn.ModuleList([ours])):
        assert torch.equal(ours(image()), plain(image()))
    plain.weight.copy_(absmax_round(plain.weight, (1, 2, 3), 7))
    assert torch.equal(ours(image()), plain(image()))
    unbatched = image(8, 7, 6)
    assert torch.equal(ours(unbatched), plain(unbatched))


def test_groups_lie_along_a_filter_and_must_divide_it():
    ours = FakeQuantConv2d.wrap(conv(kernel_size=2), LayerScheme(weight=make_spec(4, "group", group_size=16)), MinMax)
    expected = absmax_round(ours.weight.flatten(1).unflatten(1, (2, 16)), 2, 7).reshape(16, 8, 2, 2)
    assert torch.equal(ours.fake_quantized_weight(), expected)
    with pytest.raises(ValueError, match="group_size 16 does not divide input width 72"):
        FakeQuantConv2d.wrap(conv(kernel_size=3), LayerScheme(weight=make_spec(4, "group", group_size=16)), MinMax)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", ["activation", "output"])
def test_a_token_is_a_pixel(side, groups):
    spec = make_spec(4, "token", dynamic=True)
    ours = FakeQuantConv2d.wrap(conv(kernel_size=3, groups=groups), LayerScheme(**{side: spec}), MinMax)
    plain, x = conv(kernel_size=3, groups=groups), image()
    expected = plain(absmax_round(x, 1, 7)) if side == "activation" else absmax_round(plain(x), 1, 7)
    torch.testing.assert_close(ours(x), expected)
    assert not torch.equal(ours(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_a_feature_is_a_channel_and_its_scale_is_stored(groups):
    spec = make_spec(8, "feature")
    ours = FakeQuantConv2d.wrap(conv(kernel_size=3, groups=groups), LayerScheme(activation=spec, output=spec), MinMax)
    inputs, outputs = ours.activation_fake_quantizer, ours.output_fake_quantizer
    assert isinstance(inputs, LSQPlus) and inputs.scale.shape == (1, 1, 8) and outputs.scale.shape == (1, 1, 16)
    inputs.scale.copy_(image().abs().amax((0, 2, 3)) / 127)
    seen = ours.quantized_input(image().movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(seen, absmax_round(image(), (0, 2, 3), 127))
    assert ours(image()).shape == (2, 16, 5, 4)


def test_learned_scales_and_weights_get_gradients_through_a_quantized_convolution():
    ours = FakeQuantConv2d.wrap(conv(kernel_size=3, groups=2), W4, LSQ)
    RTN().initialize(BlockView(0, {"conv": ours}))
    ours(image()).square().sum().backward()
    assert ours.weight.grad.abs().amax((1, 2, 3)).min() > 0
    assert ours.weight_fake_quantizer.scale.grad.shape == (16, 1, 1) and ours.weight_fake_quantizer.scale.grad.all()


@torch.no_grad()
def test_a_convolutional_model_is_planned_covered_and_stripped():
    model = nn.Sequential(conv(kernel_size=3, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(80, 3))
    keys = set(model.state_dict())
    assert measure_coverage(model, lambda name: False).missed == {"0": 16 * 4 * 9, "2": 64, "4": 240}
    apply_plan(model, QuantPlan(dict.fromkeys("024", W4)), MinMax)
    assert list(fake_quant_layers(model)) == ["0", "2", "4"]
    assert {key for key in model.state_dict() if "_fake_quantizer." not in key} == keys
    coverage = measure_coverage(model, lambda name: False)
    assert not coverage.missed and coverage.quantized == 16 * 4 * 9 + 64 + 240
    quantized = model(image())
    assert torch.equal(strip_fake_quant(model)(image()), quantized)
    assert type(model[0]) is nn.Conv2d and set(model.state_dict()) == keys


def test_codes_of_a_filter_bank_are_in_its_matrix_shape():
    ours = FakeQuantConv2d.wrap(conv(kernel_size=3), LayerScheme(weight=QuantSpec(format="e2m1")), MinMax)
    quantizer, matrix = ours.weight_fake_quantizer, ours.as_matrix(ours.weight)
    values = quantizer.values(quantizer.codes(matrix), quantizer.stored_qparams(matrix))
    assert values.shape == (16, 72) and torch.equal(ours.from_matrix(values), ours.fake_quantized_weight())
