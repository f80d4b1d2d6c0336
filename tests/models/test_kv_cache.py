"""The KV cache of a plan in every family: attention reads it rounded, here only, in generation as in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from kdqat.models import SplitModel
from kdqat.models.kv_cache import apply_kv_cache, attention_modules, strip_kv_cache
from kdqat.models.roles import FAMILIES
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, apply_plan, full_precision, load_stored_state, stored_state
from kdqat.quant.kv import kv_caches
from kdqat.spec import KVCacheScheme, LayerScheme, QuantPlan, QuantSpec, parse_kv_cache, preset
from kdqat.types import Batch, QParams

CAUSAL = [kind for kind, family in FAMILIES.items() if family.causal]
every_decoder = pytest.mark.parametrize("kind", CAUSAL)
IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TOKEN = QuantSpec(format="int4", granularity="token", dynamic=True)
KV4 = QuantPlan({}, kv_cache=parse_kv_cache("KV4"))
FEATURE = KVCacheScheme(
    key=QuantSpec(format="int4", granularity="feature"), value=QuantSpec(format="int8", granularity="tensor")
)


def toy(kind: str = "llama", plan: QuantPlan = KV4):
    """A toy in evaluation mode with the plan's KV cache."""
    return apply_kv_cache(toy_model(kind).eval(), plan)


@torch.no_grad()
def logits(model, **kwargs) -> Tensor:
    return model(input_ids=IDS, **kwargs).logits


@torch.no_grad()
def calibrate(model) -> None:
    """Static ranges from the absmax of what the observers see."""
    for cache in kv_caches(model).values():
        cache.seen = seen = {}
        cache.observer = lambda part, rows, seen=seen: seen.update({part: rows})
    with full_precision(model):
        logits(model)
    for cache in kv_caches(model).values():
        cache.observer = None
        static = {part: q for part, q in cache.quantizers().items() if not q.spec.dynamic}
        for part, quantizer in static.items():
            absmax = cache.seen[part].abs().amax(0 if quantizer.spec.granularity == "feature" else None)
            scale = (absmax / quantizer.qmax).reshape(quantizer.scale.shape)
            quantizer.load_qparams(QParams(scale, torch.zeros_like(scale)))


def generated(model, **kwargs) -> Tensor:
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    return model.generate(IDS, do_sample=False, attention_mask=torch.ones_like(IDS), **length, **kwargs)


def rounded(x: Tensor) -> Tensor:
    """int4, one absmax scale for each token and head, written down without kdqat."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    return (x / scale).round() * scale


@torch.no_grad()
def test_keys_are_rounded_after_rope_and_values_too(monkeypatch):
    model = toy(plan=QuantPlan({}, kv_cache=KVCacheScheme(key=TOKEN, value=TOKEN)))
    plain, rope = toy_model("llama").eval(), modeling_llama.apply_rotary_pos_emb

    def rounding_rope(*args, **kwargs):
        query, key = rope(*args, **kwargs)
        return query, rounded(key)

    before = logits(plain)
    ours = logits(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rounding_rope)
    for layer in plain.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, y: rounded(y.unflatten(-1, (2, 16))).flatten(-2))
    assert torch.equal(ours, logits(plain)) and not torch.equal(ours, before)


@every_decoder
def test_every_family_passes_every_blocks_keys_and_values_through_it(kind):
    model, before = toy(kind), logits(toy_model(kind).eval())
    caches, seen = kv_caches(model), set()
    assert list(caches) == list(attention_modules(model)) and len(caches) == 2
    for name, cache in caches.items():
        cache.observer = lambda part, rows, name=name: seen.add((name, part, rows.shape[-1]))
    after = logits(model)
    assert seen == {(name, part, 16) for name in caches for part in ("key", "value")}
    assert (after - before).abs().max() > 1e-3
    with full_precision(model):
        assert torch.equal(logits(model), before)


def test_a_head_dimension_of_its_own_is_taken_from_the_config():
    config = toy_model("qwen3").config
    config.head_dim = 24  # 4 heads at a width of 64
    model = apply_kv_cache(AutoModelForCausalLM.from_config(config).eval(), QuantPlan({}, kv_cache=FEATURE))
    assert all(cache.key.shape == (1, 2 * 24) for cache in kv_caches(model).values()) and logits(model).isfinite().all()


@every_decoder
def test_stripping_gives_the_plain_model_back(kind):
    model, plain = toy(kind), toy_model(kind).eval()
    assert strip_kv_cache(model) is model
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert set(model.state_dict()) == set(plain.state_dict()) and not kv_caches(model)
    assert torch.equal(logits(model), logits(plain))


@every_decoder
def test_masks_are_built_as_for_the_plain_implementation(kind):
    """8 bits with a scale for every number change nothing but the last bit: padding and packing compute as before."""
    fine = QuantSpec(format="int8", granularity="group", group_size=1, dynamic=True)
    ours, plain = toy(kind, QuantPlan({}, kv_cache=KVCacheScheme(key=fine, value=fine))), toy_model(kind).eval()
    mask = torch.ones_like(IDS)
    mask[0, 20:] = 0
    padded = Batch(IDS, IDS, attention_mask=mask)
    positions = torch.cat([torch.arange(n) for n in (7, 9, 8)]).expand(2, -1)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate((7, 9, 8))]).expand(2, -1)
    packed = Batch(IDS, IDS, segment_ids=segments, position_ids=positions)
    for batch in (padded, packed) if FAMILIES[kind].packs else (padded,):
        with torch.no_grad():
            hidden = [SplitModel(model)(batch).hidden[:, :20] for model in (ours, plain)]
        torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "gpt2", "mixtral"])
@pytest.mark.parametrize("plan", [KV4, QuantPlan({}, kv_cache=FEATURE)], ids=["token", "static"])
def test_greedy_generation_gives_the_same_tokens_with_and_without_a_cache(kind, plan):
    model = toy_model(kind, tie=False).eval()
    for parameter in model.parameters():  # of a random model with small weights attention decides nothing
        parameter.data.mul_(6 if parameter.ndim > 1 else 1)
    calibrate(apply_kv_cache(model, plan))
    cached, anew = generated(model), generated(model, use_cache=False)
    assert torch.equal(cached, anew)
    with full_precision(model):
        assert not torch.equal(generated(model), cached)  # the toy would notice


@torch.no_grad()
def test_a_cache_holds_keys_as_they_were_computed_and_each_is_rounded_once():
    model, seen = toy(), []
    kv_caches(model)["model.layers.0.self_attn"].observer = lambda part, rows: seen.append((part, rows))
    logits(model)
    whole = seen[0][1].unflatten(0, (2, 2, 24))  # batch, heads, tokens
    past = model(input_ids=IDS[:, :20], use_cache=True).past_key_values
    model(input_ids=IDS[:, 20:], past_key_values=past)
    last = seen[-2][1].unflatten(0, (2, 2, 24))
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-6)


def test_only_this_model_is_routed_and_a_copy_of_it_is_a_model_of_its_own():
    before, other = logits(toy_model("llama").eval()), toy_model("llama").eval()
    model = toy()
    assert other.config._attn_implementation == "sdpa" and torch.equal(logits(other), before)
    twin = strip_kv_cache(copy.deepcopy(model))
    assert torch.equal(logits(twin), before) and not torch.equal(logits(model), before)


@every_decoder
def test_eager_attention_keeps_the_cache_fake_quantized(kind):
    """8 bits: at 4 a last-bit difference between the two implementations may move a code of the second block."""
    plan = QuantPlan({}, kv_cache=parse_kv_cache("KV8"))
    model, plain = toy(kind, plan), logits(toy_model(kind).eval())
    before, split = logits(model), SplitModel(model)
    split.use_eager_attention()
    assert model.config._attn_implementation == "kdqat_eager"
    with torch.no_grad():
        outputs = split(Batch(IDS, IDS), frozenset({"attentions"}))
    assert [tuple(a.shape) for a in outputs.extras["attentions"]] == [(2, 4, 24, 24)] * 2
    error = (outputs.head(outputs.hidden) - before).abs().max()
    assert error < 0.3 * (before - plain).abs().max()
    assert strip_kv_cache(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("eager", [False, True])
def test_gradients_pass_the_cache_and_scales_learn(eager):
    model = toy("llama", QuantPlan({}, kv_cache=FEATURE))
    calibrate(model)
    if eager:
        SplitModel(model).use_eager_attention()
    model.train()(input_ids=IDS).logits.square().sum().backward()
    for name, cache in kv_caches(model).items():
        assert model.get_submodule(name).k_proj.weight.grad.any()
        assert all(quantizer.scale.grad.any() for quantizer in cache.quantizers().values())


def test_deploy_only_trains_in_full_precision_and_evaluates_quantized():
    model = toy("llama", QuantPlan({}, kv_cache=KV4.kv_cache, deploy_only=("kv_cache",)))
    before = logits(toy_model("llama").eval())
    assert not torch.equal(logits(model), before) and torch.equal(logits(model.train()), before)


def test_static_ranges_survive_saving_and_the_folder_is_a_plain_model(tmp_path):
    plan = QuantPlan({}, kv_cache=FEATURE)
    model = toy("llama", plan)
    calibrate(model)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "_fake_q" not in k})
    state = stored_state(model)
    names = {f"model.layers.1.self_attn.{part}.{name}" for part in ("key", "value") for name in ("scale", "zero_point")}
    assert {key for key in state if "layers.1" in key} == names
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config._attn_implementation == "sdpa" and torch.equal(logits(plain), logits(toy_model("llama").eval()))
    again = apply_kv_cache(plain, plan)
    load_stored_state(again, state)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("order", ["cache first", "layers first"])
def test_it_goes_with_quantized_layers_in_either_order(order):
    plan = QuantPlan({"model.layers.0.self_attn.k_proj": preset("W4A16")}, kv_cache=parse_kv_cache("KV4"))
    steps = [lambda m: apply_kv_cache(m, plan), lambda m: apply_plan(m, plan, LSQ)]
    first, second = steps if order == "cache first" else reversed(steps)
    model = second(first(toy_model("llama").eval()))
    keys = {key for key in model.state_dict() if "_fake_quantizer." not in key}
    assert keys == set(toy_model("llama").state_dict())
    assert len(kv_caches(model)) == 2 and not torch.equal(logits(model), logits(toy("llama")))


def test_before_rope_it_is_the_output_of_k_and_v_with_one_scale_a_token():
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "kv"]
    plan = QuantPlan(dict.fromkeys(names, LayerScheme(output=TOKEN)))
    model, plain = apply_plan(toy_model("llama").eval(), plan, LSQ), toy_model("llama").eval()
    assert apply_kv_cache(model, plan) is model and not kv_caches(model)
    for name in names:
        plain.get_submodule(name).register_forward_hook(lambda _, __, y: rounded(y))
    assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(toy_model("llama").eval()))
    assert torch.equal(generated(model), generated(model, use_cache=False))


@pytest.mark.parametrize(("kind", "layer"), [("phi3", "self_attn.qkv_proj"), ("gpt2", "attn.c_attn")])
def test_the_output_of_a_fused_qkv_layer_is_no_cache(kind, layer):
    model = toy_model(kind)
    name = f"{FAMILIES[kind].blocks}.0.{layer}"
    with pytest.raises(ValueError, match=rf"layer {name}: output: .*queries.*after RoPE instead"):
        apply_kv_cache(model, QuantPlan({name: LayerScheme(output=TOKEN)}))


def test_a_cache_is_quantized_before_rope_or_after_it():
    keys = {"model.layers.0.self_attn.k_proj": LayerScheme(output=TOKEN)}
    with pytest.raises(ValueError, match=r"k_proj: output: .* again after RoPE; choose one"):
        toy("llama", QuantPlan(keys, kv_cache=KVCacheScheme(key=TOKEN)))
    values = QuantPlan(keys, kv_cache=KVCacheScheme(value=TOKEN))
    assert len(kv_caches(toy("llama", values))) == 2


def test_an_encoder_has_no_cache():
    with pytest.raises(ValueError, match="bert is an encoder and keeps no KV cache"):
        toy("bert")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.set_attn_implementation("flex_attention"), "attn_implementation 'flex_attention' .* use sdpa or"),
        (lambda m: setattr(m, "_can_set_attn_implementation", lambda: False), "attention of llama does not go"),
        (lambda m: apply_kv_cache(m, KV4), "has a fake-quantized KV cache already; strip_kv_cache first"),
    ],
    ids=["flex", "no interface", "twice"],
)
def test_a_model_it_cannot_reach_is_refused_by_name_and_left_as_it_was(change, message):
    model = toy_model("llama").eval()
    change(model)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_kv_cache(model, KV4)
    assert set(model.state_dict()) == before


def test_gpt2_with_an_attention_of_its_own_is_refused():
    model = toy_model("gpt2")
    model.config.reorder_and_upcast_attn = True
    apply_kv_cache(copy.deepcopy(model), KV4)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"reorder_and_upcast_attn .*'sdpa'"):
        apply_kv_cache(model, KV4)


def test_a_spec_that_does_not_fit_leaves_the_model_untouched():
    scheme = KVCacheScheme(value=QuantSpec(format="int4", granularity="group", group_size=32, dynamic=True))
    model = toy_model("llama")
    with pytest.raises(ValueError, match=r"kv_cache\.value: group_size 32 does not divide input width 16"):
        apply_kv_cache(model, QuantPlan({}, kv_cache=scheme))
    assert not kv_caches(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("eager", [False, True])
def test_it_compiles_without_a_graph_break(eager):
    model = toy("gemma2" if eager else "llama")
    explained = torch._dynamo.explain(model)(input_ids=IDS, use_cache=False)
    torch._dynamo.reset()
    assert explained.graph_break_count == 0, explained.break_reasons
