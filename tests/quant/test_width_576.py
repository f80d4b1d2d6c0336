"""SmolLM2 is 576 wide: which presets fit, and what is said of those that do not; wide ones on a layer of 1024."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.initializers import RTN
from kdqat.metrics import sqnr_db
from kdqat.quant import LSQ, MinMax, apply_plan, strip_fake_quant
from kdqat.spec import PRESETS, QuantPlan
from kdqat.types import BlockView

REMEDY = {128: "group_size 128 does not divide input width 576: use group_size 32 or 64"}
TOO_WIDE = {name: 128 for name, scheme in PRESETS.items() if scheme.weight.group_size == 128}
K_QUANTS = [name for name, scheme in PRESETS.items() if scheme.weight.scale_dtype == "k6"]
FITTING = [name for name in PRESETS if name not in TOO_WIDE and name not in K_QUANTS]


def model(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32, bias=False), nn.Linear(32, 8))


def plan(name: str) -> QuantPlan:
    return QuantPlan({"0": PRESETS[name]})


def test_groups_of_16_32_and_64_are_among_those_that_fit_and_others_are_not():
    sizes = {PRESETS[name].weight.group_size for name in FITTING}
    assert sizes == {None, 16, 32, 64}
    assert "GGUF_Q4_K" in K_QUANTS and "W4A16_G128" in TOO_WIDE and "AWQ_4BIT_G128" in TOO_WIDE


def computes_close_to_full_precision(name: str, width: int, quantizer) -> None:
    """Apply, initialize, compute, strip: finite, near the weight, and the stripped layer gives the same output."""
    layers, x = model(width), torch.randn(4, width)
    weight = layers[0].weight.detach().clone()
    apply_plan(layers, plan(name), quantizer)
    RTN().initialize(BlockView(0, {"0": layers[0]}))
    assert sqnr_db(weight, layers[0].fake_quantized_weight()) > min(3.5 * PRESETS[name].weight.bits - 2, 24)
    out = layers(x)
    assert out.isfinite().all()
    out.sum().backward()
    assert layers[0].weight.grad.isfinite().all() and layers[0].weight.grad.any()
    if PRESETS[name].activation is None:
        expected = layers(x)
        assert torch.equal(strip_fake_quant(layers)(x), expected)


@pytest.mark.parametrize("name", FITTING)
def test_a_preset_that_fits_quantizes_a_layer_of_576(name):
    computes_close_to_full_precision(name, 576, LSQ)


@pytest.mark.parametrize("name", [*TOO_WIDE, *K_QUANTS])
@pytest.mark.parametrize("quantizer", [LSQ, MinMax])
def test_groups_of_128_and_k_quants_work_on_a_layer_of_1024(name, quantizer):
    computes_close_to_full_precision(name, 1024, quantizer)


@pytest.mark.parametrize("name", TOO_WIDE)
def test_groups_of_128_are_refused_at_576_with_the_layer_and_the_group_sizes_that_fit(name):
    layers = model(576)
    with pytest.raises(ValueError, match=f"layer 0: {REMEDY[128]}"):
        apply_plan(layers, plan(name), LSQ)
    assert type(layers[0]) is nn.Linear


@pytest.mark.parametrize("name", K_QUANTS)
def test_a_k_quant_is_refused_at_576_with_the_layer_and_the_formats_that_fit(name):
    layers = model(576)
    with pytest.raises(ValueError, match=r"layer 0: .*super-blocks of 8 groups = 256 inputs, which do not divide"):
        apply_plan(layers, plan(name), LSQ)
    with pytest.raises(ValueError, match="input width 576: use GGUF_Q4_1 or GGUF_Q4_0 there"):
        apply_plan(layers, plan(name), MinMax)
    assert type(layers[0]) is nn.Linear
