"""FakeQuantLinear: still an nn.Linear to everybody else, and exactly its export."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kdqat.initializers import RTN
from kdqat.quant import LSQ, FakeQuantLinear, MinMax
from kdqat.spec import LayerScheme, preset
from kdqat.types import BlockView
from tests.quant.specs import make_spec

W4 = LayerScheme(weight=make_spec(4, scale_dtype="float16"))


def make_layer(scheme: LayerScheme = W4, quantizer=LSQ, **kwargs) -> FakeQuantLinear:
    torch.manual_seed(0)
    layer = FakeQuantLinear.wrap(nn.Linear(16, 8, **kwargs), scheme, quantizer)
    RTN().initialize(BlockView(0, {"layer": layer}))
    return layer


def test_it_keeps_the_keys_of_a_linear_and_adds_only_the_quantizers_own():
    keys = {f"weight_fake_quantizer.{name}" for name in ("scale", "zero_point", "qmin", "qmax")}
    assert set(make_layer().state_dict()) == {"weight", "bias"} | keys
    assert set(make_layer(bias=False).state_dict()) == {"weight"} | keys
    assert set(make_layer(LayerScheme()).state_dict()) == {"weight", "bias"}


def test_it_takes_over_the_parameter_objects_mode_and_device():
    linear = nn.Linear(16, 8).eval()
    layer = FakeQuantLinear.wrap(linear, W4, LSQ)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and not layer.weight_fake_quantizer.training
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (16, 8)
    on_meta = FakeQuantLinear.wrap(nn.Linear(16, 8, device="meta"), W4, LSQ)
    assert {tensor.device.type for tensor in on_meta.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(twin):
    layer, x = make_layer(), torch.randn(3, 16)
    other = twin(layer)
    assert torch.equal(other(x), layer(x))
    assert not {t.data_ptr() for t in layer.state_dict().values()} & {t.data_ptr() for t in other.state_dict().values()}


def test_its_output_uses_the_fake_quantized_weight_and_not_the_latent_one():
    layer, x = make_layer(), torch.randn(3, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight_fake_quantizer(layer.weight), layer.bias))
    assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantizer", [LSQ, MinMax])
def test_the_plain_linear_made_of_it_gives_the_same_output_bit_for_bit(bias, quantizer):
    layer, x = make_layer(quantizer=quantizer, bias=bias), torch.randn(5, 16)
    linear = layer.unwrap()
    assert type(linear) is nn.Linear and set(linear.state_dict()) == {"weight", *(["bias"] if bias else [])}
    assert torch.equal(linear(x), layer(x))
    assert all(row.unique().numel() <= 16 for row in linear.weight)
    assert linear.weight.requires_grad and linear.weight.data_ptr() != layer.weight.data_ptr()
    assert linear.training == layer.training


def test_a_scheme_without_a_weight_spec_leaves_the_layer_in_full_precision():
    layer, x = make_layer(LayerScheme()), torch.randn(3, 16)
    assert layer.weight_fake_quantizer is None
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_under_bf16_autocast_the_output_is_bf16_and_the_grid_is_still_computed_in_fp32():
    layer, x = make_layer(), torch.randn(3, 16)
    expected = layer.fake_quantized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        out, weight = layer(x), layer.fake_quantized_weight()
    assert out.dtype == torch.bfloat16
    assert weight.dtype == torch.float32 and torch.equal(weight, expected)
    out.float().sum().backward()
    assert layer.weight.grad.dtype == layer.weight_fake_quantizer.scale.grad.dtype == torch.float32


def test_a_bf16_weight_stays_bf16_outside():
    layer = FakeQuantLinear.wrap(nn.Linear(16, 8, dtype=torch.bfloat16), preset("W4A16"), MinMax)
    assert layer.fake_quantized_weight().dtype == torch.bfloat16
    assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
