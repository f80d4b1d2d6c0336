"""A static activation range is stored, so a quantizer that keeps none is refused where the range would be needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.models.toy import toy_model
from kdqat.quant import FakeQuantExperts, Fixed, LearnedClipping, LSQPlus, MinMax, MSEClip, apply_plan
from kdqat.quant.kv import KVCacheFakeQuantizer
from kdqat.spec import KVCacheScheme, LayerScheme, QuantPlan
from tests.quant.specs import make_spec

STATIC = make_spec(8, "tensor")
TOKEN = make_spec(8, "token", dynamic=True)

live = pytest.mark.parametrize("quantizer", [MinMax, MSEClip, LearnedClipping])
REFUSED = r"takes its range from the live tensor, .*use LSQPlus or Fixed .*dynamic: true"


def planned(quantizer, **scheme) -> nn.Module:
    plan = QuantPlan({"0": LayerScheme(**scheme)})
    return apply_plan(nn.Sequential(nn.Linear(8, 8)), plan, Fixed, quantizer)


@live
@pytest.mark.parametrize("side", ["activation", "output"])
def test_of_a_layer_it_is_refused_by_name(quantizer, side):
    with pytest.raises(ValueError, match=f"layer 0: {side}: {quantizer.__name__} {REFUSED}"):
        planned(quantizer, **{side: STATIC})


@live
def test_of_experts_it_is_refused_by_weight(quantizer):
    experts = toy_model("mixtral").get_submodule("model.layers.0.mlp.experts")
    with pytest.raises(ValueError, match=f"down_proj: activation: {quantizer.__name__} {REFUSED}"):
        FakeQuantExperts.wrap(experts, {"down_proj": LayerScheme(activation=STATIC)}, Fixed, quantizer)


@live
@pytest.mark.parametrize("part", ["key", "value"])
def test_of_a_kv_cache_it_is_refused_by_part(quantizer, part):
    with pytest.raises(ValueError, match=rf"kv_cache\.{part}: {quantizer.__name__} {REFUSED}"):
        KVCacheFakeQuantizer(KVCacheScheme(**{part: STATIC}), num_heads=2, head_dim=8, activation_quantizer=quantizer)


def test_a_live_weight_a_dynamic_range_and_a_stored_one_are_taken():
    planned(MinMax, activation=TOKEN, output=TOKEN)
    for quantizer in (LSQPlus, Fixed):
        planned(quantizer, activation=STATIC, output=STATIC)
    apply_plan(nn.Sequential(nn.Linear(8, 8)), QuantPlan({"0": LayerScheme(weight=make_spec(4))}), MinMax)
    KVCacheFakeQuantizer(KVCacheScheme(key=TOKEN), num_heads=2, head_dim=8, activation_quantizer=MinMax)


def test_a_spec_that_does_not_fit_names_the_side():
    with pytest.raises(ValueError, match=r"layer 0: activation: LSQPlus stores scales; .*needs MinMax"):
        planned(LSQPlus, activation=TOKEN)
    with pytest.raises(ValueError, match=r"layer 0: output: hadamard 16 does not divide"):
        planned(Fixed, output=make_spec(8, "tensor", hadamard=16))
    assert torch.Size((1, 8)) == planned(Fixed, activation=STATIC)[0].activation_fake_quantizer.shape
