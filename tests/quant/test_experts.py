"""Fake-quantized experts compute what transformers' experts compute with the fake-quantized weights put in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdqat.models.toy import toy_model
from kdqat.quant import (
    LSQ,
    FakeQuantExperts,
    Fixed,
    MinMax,
    apply_plan,
    fake_quant_layers,
    full_precision,
    strip_fake_quant,
)
from kdqat.quant.coverage import measure_coverage, require_coverage
from kdqat.quant.experts import EXPERT_WEIGHTS
from kdqat.spec import LayerScheme, QuantPlan, preset
from kdqat.types import QParams
from tests.quant.specs import make_spec

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")
W4 = LayerScheme(weight=make_spec(4, "group", group_size=32))
every_kind = pytest.mark.parametrize("kind", KINDS)


def plain_experts(kind: str = "mixtral") -> nn.Module:
    """The experts of a toy's first block: 4 of them, inputs of width 64."""
    return toy_model(kind).model.layers[0].mlp.experts


def wrapped(kind: str = "mixtral", scheme: LayerScheme = W4, quantizer=MinMax, **kwargs) -> FakeQuantExperts:
    return FakeQuantExperts.wrap(plain_experts(kind), dict.fromkeys(EXPERT_WEIGHTS, scheme), quantizer, **kwargs)


def routed(tokens: int = 12, experts: tuple[int, ...] = (0, 1, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of `tokens`, two different experts for each among `experts`, and their shares."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randperm(len(experts), generator=generator)[:2] for _ in range(tokens)])
    shares = torch.rand(tokens, 2, generator=generator).softmax(1)
    return torch.randn(tokens, 64, generator=generator), torch.tensor(experts)[pairs], shares


@every_kind
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_without_fake_quantization_it_is_transformers_own_forward(kind, implementation):
    plain, ours = plain_experts(kind), wrapped(kind)
    plain.config._experts_implementation = implementation
    ours.fake_quantize = False
    torch.testing.assert_close(ours(*routed()), plain(*routed()), rtol=1e-5, atol=1e-7)
    ours.fake_quantize = True
    assert (ours(*routed()) - plain(*routed())).abs().max() > 1e-5


@every_kind
def test_it_computes_with_the_fake_quantized_weight_of_every_expert(kind):
    plain, ours, spec = plain_experts(kind), wrapped(kind), make_spec(4, "group", group_size=32)
    plain.config._experts_implementation = "eager"
    for name in EXPERT_WEIGHTS:
        weight = getattr(plain, name)
        matrices = [MinMax(spec, matrix.shape)(matrix) for matrix in weight]  # expert by expert
        weight.data.copy_(torch.stack(matrices))
    # not torch.equal: with several threads the sums over experts differ in the last bit
    torch.testing.assert_close(ours(*routed()), plain(*routed()), rtol=1e-5, atol=1e-8)


@every_kind
def test_unwrapping_gives_the_plain_class_with_the_fake_quantized_weights(kind):
    ours = wrapped(kind)
    plain = ours.unwrap()
    assert type(plain) is type(plain_experts(kind)) and set(plain.state_dict()) == set(EXPERT_WEIGHTS)
    assert set(vars(plain)) == set(vars(plain_experts(kind)))
    torch.testing.assert_close(plain(*routed()), ours(*routed()), rtol=1e-5, atol=1e-7)


def test_keys_are_the_plain_ones_and_those_of_fake_quantizers():
    scheme = LayerScheme(weight=W4.weight, activation=make_spec(8, "tensor"))
    keys = set(wrapped(scheme=scheme).state_dict())
    assert {key for key in keys if "_fake_quantizer." not in key} == set(EXPERT_WEIGHTS)
    assert {f"{name}_fake_quantizer.scale" for name in EXPERT_WEIGHTS} <= keys
    assert {f"{name}_activation_fake_quantizer.scale" for name in EXPERT_WEIGHTS} <= keys


def test_gradients_reach_weights_and_scales_of_the_experts_that_were_hit_and_of_no_other():
    ours = wrapped(quantizer=LSQ)
    for name in EXPERT_WEIGHTS:
        matrix = getattr(ours, name).flatten(0, 1)
        scale = matrix.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 7
        part = ours.part(name).weight_fake_quantizer
        part.load_qparams(QParams(scale, torch.zeros_like(scale)))
    ours(*routed(experts=(0, 1, 3))).square().sum().backward()
    for name in EXPERT_WEIGHTS:
        scales = ours.part(name).weight_fake_quantizer.scale.grad.unflatten(0, (4, -1))
        for grad in (getattr(ours, name).grad, scales):
            assert [bool(expert.any()) for expert in grad] == [True, True, False, True]


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_activations_of_both_weights_are_quantized_and_an_expert_without_tokens_does_no_harm(granularity):
    spec = make_spec(4, granularity, dynamic=True)
    ours, (states, index, shares) = wrapped(scheme=LayerScheme(activation=spec)), routed(3, (1, 2))
    plain, out = plain_experts(), torch.zeros(3, 64)
    rounded = MinMax(spec, torch.Size((1, 64)))(states)
    for expert in (1, 2):
        token, choice = torch.where(index == expert)
        gate, up = (rounded[token] @ plain.gate_up_proj[expert].T).chunk(2, dim=1)
        middle = MinMax(spec, torch.Size((1, 128)))(nn.functional.silu(gate) * up)
        out[token] += (middle @ plain.down_proj[expert].T) * shares[token, choice, None]
    torch.testing.assert_close(ours(states, index, shares), out, rtol=1e-4, atol=1e-6)


def test_activations_that_are_for_deployment_only_wait_for_evaluation():
    spec = make_spec(4, "token", dynamic=True)
    ours = wrapped(scheme=LayerScheme(activation=spec), deploy_only=("activation",))
    with torch.no_grad():
        training, evaluation = ours.train()(*routed()), ours.eval()(*routed())
        plain = wrapped(scheme=LayerScheme())(*routed())
    assert torch.equal(training, plain) and not torch.equal(evaluation, plain)


def test_an_index_beyond_the_experts_counts_nothing():
    states, index, shares = routed()
    plain = plain_experts()
    plain.config._experts_implementation = "eager"
    index[:, 1] = 4
    ours = wrapped(scheme=LayerScheme())
    assert torch.equal(ours(states, index, shares), plain(states, index, shares))


def test_a_quantized_output_is_refused_because_there_is_none():
    with pytest.raises(ValueError, match="gate_up_proj: experts have no output of their own"):
        wrapped(scheme=LayerScheme(output=make_spec(8, "token", dynamic=True)))


def test_one_weight_may_be_planned_and_the_other_left():
    model = toy_model("mixtral").eval()
    before = model.model.layers[0].mlp.experts.down_proj
    apply_plan(model, QuantPlan({"model.layers.0.mlp.experts.gate_up_proj": W4}), Fixed)
    experts = model.model.layers[0].mlp.experts
    assert experts.part("down_proj").weight_fake_quantizer is None and experts.down_proj is before
    layers = fake_quant_layers(model)
    assert [name.rpartition(".")[2] for name in layers] == list(EXPERT_WEIGHTS)
    missed = measure_coverage(model, lambda name: "gate_up_proj" not in name and "experts" not in name).missed
    expected = {
        f"model.layers.{i}.mlp.experts.{n}" for i, n in ((0, "down_proj"), (1, "gate_up_proj"), (1, "down_proj"))
    }
    assert set(missed) == expected and missed["model.layers.0.mlp.experts.down_proj"] == 4 * 64 * 128


def test_stripping_and_full_precision_know_experts():
    model = toy_model("qwen3_moe").eval()
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in EXPERT_WEIGHTS]
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        apply_plan(model, QuantPlan(dict.fromkeys(names, preset("W2A16"))), MinMax)
        quantized = model(input_ids=ids).logits
        with full_precision(model):
            torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
        stripped = strip_fake_quant(model)(input_ids=ids).logits
    assert not fake_quant_layers(model) and (quantized - before).abs().max() > 1e-3
    torch.testing.assert_close(stripped, quantized, rtol=1e-5, atol=1e-6)


class GptOssLikeExperts(nn.Module):
    """A layout that kdqat does not know: transposed, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 256))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 256))
        self.down_proj = nn.Parameter(torch.zeros(4, 128, 64))


def test_experts_of_an_unknown_layout_stop_the_run_by_name_planned_or_not():
    model = toy_model("mixtral")
    model.model.layers[1].mlp.experts = GptOssLikeExperts()
    name = "model.layers.1.mlp.experts"
    missed = measure_coverage(model, lambda name: "layers.1.mlp.experts" not in name)
    with pytest.raises(ValueError, match=rf"weights would silently stay in full precision: {name}; put them into"):
        require_coverage(missed)
    assert missed.missed == {name: 4 * 64 * 256 + 4 * 256 + 4 * 128 * 64}
    with pytest.raises(ValueError, match=rf"layer {name}: it is a GptOssLikeExperts; .*put it into `ignore`"):
        apply_plan(model, QuantPlan({name: W4}), MinMax)
    with pytest.raises(ValueError, match=rf"has no layer '{name}\.down_proj'"):
        apply_plan(model, QuantPlan({f"{name}.down_proj": W4}), MinMax)


@pytest.mark.parametrize("path", ["gpt_oss.modeling_gpt_oss.GptOssExperts", "llama4.modeling_llama4.Llama4TextExperts"])
def test_transformers_other_layouts_are_not_taken_for_the_known_one(path):
    module, _, name = path.rpartition(".")
    cls = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)
    with torch.device("meta"):
        assert not FakeQuantExperts.wraps(cls.__new__(cls))
