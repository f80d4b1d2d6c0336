"""A KV cache's fake quantizer: who shares a scale, when it is off, what calibration sees, what is stored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdqat.quant import MinMax, full_precision, load_stored_state, stored_state
from kdqat.quant.kv import KVCacheFakeQuantizer, kv_caches
from kdqat.spec import KV_PRESETS, KVCacheScheme, QuantSpec
from kdqat.types import QParams
from tests.quant.specs import make_spec

B, HEADS, T, D = 2, 3, 5, 8
TOKEN = make_spec(4, "token", dynamic=True)
FEATURE = make_spec(8, "feature")
TENSOR = make_spec(8, "tensor")


def states(seed: int = 0) -> Tensor:
    """Keys or values [B, heads, T, D] whose heads, tokens and channels have ranges of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, HEADS, T, D, generator=generator)
    return x * torch.rand(B, HEADS, T, 1, generator=generator) * (1 + torch.arange(D))


def cache(key: QuantSpec | None, value: QuantSpec | None = None, **kwargs) -> KVCacheFakeQuantizer:
    return KVCacheFakeQuantizer(KVCacheScheme(key=key, value=value), num_heads=HEADS, head_dim=D, **kwargs)


def absmax_round(x: Tensor, dims, qmax: int) -> Tensor:
    """Round to nearest with one absmax scale over `dims`, written down without kdqat."""
    scale = x.abs().amax(dims, keepdim=True) / qmax
    return (x / scale).round().clamp(-qmax - 1, qmax) * scale


def test_token_granularity_has_one_scale_for_each_token_of_each_head():
    key, value = states(0), states(1)
    k, v = cache(TOKEN, make_spec(8, "token", dynamic=True))(key, value)
    assert torch.equal(k, absmax_round(key, 3, 7)) and torch.equal(v, absmax_round(value, 3, 127))


def test_group_granularity_cuts_the_head_dimension():
    key = states()
    k, _ = cache(make_spec(4, "group", group_size=4, dynamic=True))(key, key)
    assert torch.equal(k, absmax_round(key.unflatten(3, (2, 4)), 4, 7).flatten(3))


def test_feature_granularity_has_a_stored_scale_for_each_channel_of_each_head():
    key, module = states(), cache(FEATURE)
    assert module.key.scale.shape == (1, 1, HEADS * D)
    scale = key.abs().amax((0, 2)) / 127  # [heads, D]
    module.key.load_qparams(QParams(scale.reshape(1, 1, -1), torch.zeros(1, 1, HEADS * D)))
    assert torch.equal(module(key, key)[0], absmax_round(key, (0, 2), 127))


def test_tensor_granularity_has_one_stored_scale():
    key, module = states(), cache(TENSOR)
    module.key.load_qparams(QParams((key.abs().amax() / 127).reshape(1), torch.zeros(1)))
    assert torch.equal(module(key, key)[0], absmax_round(key, (0, 1, 2, 3), 127))


def test_a_cache_may_quantize_one_of_the_two_and_keeps_the_dtype():
    key = states().bfloat16()
    module = cache(None, TOKEN)
    k, v = module(key, key)
    assert k is key and v.dtype == torch.bfloat16 and v.shape == key.shape and not torch.equal(v, key)
    assert list(module.quantizers()) == ["value"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (make_spec(4, "group", group_size=12, dynamic=True), r"key: group_size 12 does not divide input width 8"),
        (make_spec(4, "tensor", dynamic=True), r"kv_cache\.key: .*depend on tokens after it: use granularity 'token'"),
    ],
    ids=["group size", "live tensor range"],
)
def test_a_spec_that_does_not_fit_is_refused_with_the_remedy(key, message):
    with pytest.raises(ValueError, match=message):
        cache(key)


def test_a_token_is_rounded_alike_alone_and_among_others():
    key, module = states(), cache(TOKEN)
    together = module(key, key)[0]
    alone = torch.cat([module(key[:, :, t : t + 1], key)[0] for t in range(T)], dim=2)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("spec", "moves"),
    [
        (KV_PRESETS["KV8"], False),
        (KV_PRESETS["KV4"], False),
        (make_spec(4, "token", dynamic=True, scale_rule="absmax_half"), True),
        (QuantSpec(format="ternary", granularity="token", dynamic=True, scale_rule="mean"), True),
    ],
    ids=["absmax", "min-max", "absmax_half", "mean"],
)
def test_rounding_rounded_keys_again_is_harmless_for_the_presets_and_not_for_every_rule(spec, moves):
    """Why it matters that transformers' cache holds keys before they are rounded: see `models/kv_cache.py`."""
    key = torch.randn(4, HEADS, 64, D, generator=torch.Generator().manual_seed(0))
    module = cache(spec)
    once, _ = module(key, key)
    twice, _ = module(once, once)
    moved = ((twice - once).abs() > 1e-5).float().mean()
    assert moved > 0.5 if moves else moved == 0


def test_gradients_reach_keys_values_and_learned_scales():
    key, module = states().requires_grad_(), cache(FEATURE, TOKEN)
    k, v = module(key, key)
    (k.square().sum() + v.square().sum()).backward()
    assert key.grad.isfinite().all() and key.grad.any()
    assert module.key.scale.grad.any()
    assert not list(module.value.parameters())


def test_full_precision_switches_it_off_and_on_again():
    key, module = states(), cache(TOKEN, TOKEN)
    with full_precision(nn.ModuleList([module])):
        assert all(out is key for out in module(key, key))
    assert not torch.equal(module(key, key)[0], key)


def test_deploy_only_is_off_in_training_and_on_in_evaluation():
    key, module = states(), cache(TOKEN, TOKEN, deploy_only=("kv_cache",))
    assert module.train()(key, key)[0] is key
    assert not torch.equal(module.eval()(key, key)[0], key)
    always = cache(TOKEN, TOKEN, deploy_only=("activation",))
    assert not torch.equal(always.train()(key, key)[0], key)


@pytest.mark.parametrize("on", [True, False])
def test_the_observer_sees_what_is_rounded_before_it_is_also_where_fake_quantization_is_off(on):
    seen = {}
    key, value, module = states(0), states(1), cache(FEATURE, TOKEN)
    module.observer = lambda part, rows: seen.update({part: rows})
    module.fake_quantize = on
    module(key, value)
    assert torch.equal(seen["key"], key.transpose(1, 2).reshape(B * T, HEADS * D))
    assert torch.equal(seen["value"], value.reshape(B * HEADS * T, D))


def test_calibrated_ranges_are_saved_under_the_attentions_name_and_loaded_into_another():
    def model() -> nn.Module:
        attention = nn.Module()
        attention.kv_cache_fake_quantizer = cache(FEATURE, TENSOR)
        return nn.ModuleDict({"attn": attention})

    calibrated, other = model(), model()
    for quantizer in kv_caches(calibrated)["attn"].quantizers().values():
        torch.nn.init.uniform_(quantizer.scale, 0.5, 1.5)
    state = stored_state(calibrated)
    assert set(state) == {"attn.key.scale", "attn.key.zero_point", "attn.value.scale", "attn.value.zero_point"}
    load_stored_state(other, state)
    key = states()
    for ours, theirs in zip(kv_caches(calibrated)["attn"](key, key), kv_caches(other)["attn"](key, key), strict=True):
        assert torch.equal(ours, theirs)
    del state["attn.value.scale"]
    with pytest.raises(ValueError, match=r"attn\.value\.scale is missing"):
        load_stored_state(other, state)


def test_live_ranges_store_nothing_and_a_second_level_is_stored():
    nested = QuantSpec(format="e2m1", granularity="group", group_size=8, scale_dtype="e4m3_global", dynamic=True)
    attention = nn.Module()
    attention.kv_cache_fake_quantizer = cache(TOKEN, nested)
    assert set(stored_state(attention)) == {".value.global_scale"}


def test_it_can_be_copied_and_its_quantizer_is_the_one_asked_for():
    module = copy.deepcopy(cache(TOKEN, activation_quantizer=lambda spec, shape: MinMax(spec, shape, ste="clipped")))
    assert module.key.ste == "clipped" and module.key.shape == (1, D) and module.value is None
