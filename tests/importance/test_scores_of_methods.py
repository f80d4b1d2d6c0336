"""Each method against its formula: golden values, plain second implementations, and the order it gives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from kdqat.importance import LIM, ZD, ActivationNorm, Fisher, HessianTrace, OutputKL, WeightSQNR
from kdqat.importance.fisher import squared_gradients
from kdqat.importance.hessian_trace import hutchinson
from kdqat.importance.lim import Turn
from kdqat.importance.zd import share_of_large
from kdqat.metrics import sqnr_db, token_kl
from kdqat.models import SplitModel, layer_refs
from kdqat.models.toy import toy_model
from kdqat.quant import MinMax, apply_plan
from kdqat.spec import QuantPlan, preset
from kdqat.types import Batch
from tests.calibrate.toy import split_model, text, texts

X = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
Y = torch.tensor([[1.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
SCHEMES = ["W4A16_G32", "W2A16_G32"]


@pytest.mark.parametrize(("aggregate", "lim"), [("per_token", -0.739979), ("flattened", -0.904534),
                                                ("per_sample", -0.904534)])  # fmt: skip
def test_lims_golden_values(aggregate, lim):
    turn = Turn(aggregate, [[2]])
    turn.hear_input(X)
    turn.hear_output(Y)
    assert -turn.cosine() == pytest.approx(lim, abs=1e-6)


def test_samples_of_one_token_each_are_tokens_and_micro_batches_do_not_matter():
    whole, parts = Turn("per_sample", [[1, 1]]), Turn("per_token", [[1], [1]])
    whole.hear_input(X)
    whole.hear_output(Y)
    for row in (0, 1):
        parts.hear_input(X[row : row + 1])
        parts.hear_output(Y[row : row + 1])
    assert whole.cosine() == pytest.approx(parts.cosine()) == pytest.approx(0.739979, abs=1e-6)


def test_lim_is_the_cosine_of_what_the_model_hands_from_block_to_block():
    split, batches = split_model(), texts()
    scores = LIM().score(split, layer_refs(split.model), batches)
    with torch.no_grad():
        hidden = [split(batch, frozenset({"hidden_states"})).extras["hidden_states"] for batch in batches]
    first = torch.cat([F.cosine_similarity(h[0], h[1], dim=-1).flatten() for h in hidden])
    assert scores.importance["model.layers.0"] == pytest.approx(-float(first.mean()), abs=1e-5)
    assert list(scores.importance) == ["model.layers.0", "model.layers.1"]


def test_lim_leaves_padding_out():
    split, batch = split_model(), text(rows=2, tokens=24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 10:] = 0
    padded = [batch._replace(attention_mask=mask)]
    rows = [Batch(batch.input_ids[:1], batch.labels[:1]), Batch(batch.input_ids[1:, :10], batch.labels[1:, :10])]
    for aggregate in ("per_token", "per_sample", "flattened"):
        scores = [LIM(aggregate=aggregate).score(split, layer_refs(split.model), b).importance for b in (padded, rows)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_zds_golden_values():
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, -4.0])
    assert share_of_large([weight]) == pytest.approx(1 / 6)
    assert share_of_large([weight], two_sided=True) == pytest.approx(2 / 6)
    assert share_of_large([weight[:2], weight[2:]]) == pytest.approx(1 / 6)  # pooled over tensors


def test_zd_counts_as_normal_weights_should_be_and_fewer_outliers_are_more_important():
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert share_of_large([normal]) == pytest.approx(0.1587, abs=2e-3)
    assert share_of_large([normal], two_sided=True) == pytest.approx(0.3173, abs=2e-3)
    split = split_model()
    scores = ZD(unit="layer", sides="two_sided").score(split, layer_refs(split.model))
    for name, score in scores.importance.items():
        weight = split.model.get_submodule(name).weight
        assert score == pytest.approx(-float(((weight - weight.mean()).abs() > weight.std()).double().mean()))


def test_pooling_takes_mean_and_deviation_over_the_block():
    split = split_model()
    with torch.no_grad():
        split.model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(100)
    pooled, apart = (ZD(pooled=p).score(split, layer_refs(split.model)).importance for p in (True, False))
    assert pooled["model.layers.0"] > -0.08 and apart["model.layers.0"] < -0.14  # one layer drowns the others


def test_activation_norm_hears_what_goes_in():
    split, batches = split_model(), texts()
    with torch.no_grad():
        hidden = torch.cat([split(b, frozenset({"hidden_states"})).extras["hidden_states"][1] for b in batches])
    scores = ActivationNorm().score(split, layer_refs(split.model), batches)
    assert scores.importance["model.layers.1"] == pytest.approx(float(hidden.norm(dim=-1).mean()), rel=1e-5)
    layers = ActivationNorm(unit="layer").score(split, layer_refs(split.model), batches).importance
    same = [layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    assert len(layers) == 14 and same[0] == same[1] == same[2] != layers["model.layers.0.self_attn.o_proj"]


def test_weight_sqnr_is_that_of_the_fake_quantized_weight():
    split = split_model()
    scores = WeightSQNR(SCHEMES, start="rtn", unit="layer").score(split, layer_refs(split.model))
    name = "model.layers.1.mlp.down_proj"
    weight = split.model.get_submodule(name).weight.detach()
    low = MinMax(preset("W2A16_G32").weight, weight.shape)(weight).detach()
    assert scores.importance[name] == pytest.approx(-float(sqnr_db(weight, low)), rel=1e-4)
    assert scores.cost[name]["W4A16_G32"] < scores.cost[name]["W2A16_G32"] < 1
    better = WeightSQNR(SCHEMES, unit="layer").score(split, layer_refs(split.model))
    assert better.cost[name]["W2A16_G32"] < scores.cost[name]["W2A16_G32"]  # the search loses less


@torch.no_grad()
def kl_with(split: SplitModel, names: list[str], scheme: str, batches: list[Batch]) -> float:
    """Mean KL to `split` of a copy with some layers swapped for fake-quantized ones."""
    changed = copy.deepcopy(split)
    apply_plan(changed.model, QuantPlan(dict.fromkeys(names, preset(scheme))), MinMax)
    answers = [[m.head(m(b).hidden[:, :-1].flatten(0, 1)) for b in batches] for m in (split, changed)]
    return float(torch.cat([token_kl(t, s) for t, s in zip(*answers, strict=True)]).double().mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_output_kl_is_the_kl_of_a_model_with_one_block_swapped(kind):
    split, batches = split_model(kind), texts(2)
    before = {name: tensor.clone() for name, tensor in split.state_dict().items()}
    scores = OutputKL(SCHEMES, start="rtn").score(split, layer_refs(split.model), batches)
    for unit, names in scores.members.items():
        costs = [kl_with(split, list(names), scheme, batches) for scheme in SCHEMES]
        assert [scores.cost[unit][scheme] for scheme in SCHEMES] == pytest.approx(costs, rel=2e-2, abs=1e-7)
        assert scores.importance[unit] == pytest.approx(costs[1] - costs[0], rel=2e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in split.state_dict().items())
    assert not any("forward" in vars(module) for module in split.modules())


def test_output_kl_of_single_layers_and_leave_one_out():
    split, batches = split_model(), texts(2)
    refs = layer_refs(split.model)
    layers = OutputKL(["W2A16_G32"], start="rtn", unit="layer").score(split, refs, batches)
    name = "model.layers.1.self_attn.v_proj"
    assert layers.cost[name]["W2A16_G32"] == pytest.approx(kl_with(split, [name], "W2A16_G32", batches), rel=2e-2)
    assert layers.importance[name] == layers.cost[name]["W2A16_G32"]  # of a single candidate: its cost
    out = OutputKL(SCHEMES, mode="leave_one_out", start="rtn").score(split, refs, batches)
    names = [list(layers) for layers in out.members.values()]
    everything = kl_with(split, names[0] + names[1], "W2A16_G32", batches)
    alone = kl_with(split, names[1], "W2A16_G32", batches)
    assert out.cost["model.layers.0"]["W2A16_G32"] == pytest.approx(everything - alone, rel=2e-2)


def test_output_kl_leaves_padding_out():
    split, batch = split_model(), text(rows=2, tokens=24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 10:] = 0
    padded = [batch._replace(attention_mask=mask)]
    rows = [Batch(batch.input_ids[:1], batch.labels[:1]), Batch(batch.input_ids[1:, :10], batch.labels[1:, :10])]
    scores = [OutputKL(SCHEMES).score(split, layer_refs(split.model), b).importance for b in (padded, rows)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def mean_loss(split, weight, ids):
    logits = split.head(split(Batch(ids, ids)).hidden[0, :-1])
    return F.cross_entropy(logits, ids[0, 1:])


def test_fisher_sums_squared_gradients_of_rows_and_weighs_the_perturbation_by_them():
    split, batches = split_model(), [text(rows=2, tokens=12)]
    weight = split.model.get_submodule("model.layers.0.self_attn.k_proj").weight
    expected = torch.zeros_like(weight)
    for ids in batches[0].input_ids.split(1):
        (grad,) = torch.autograd.grad(mean_loss(split, weight, ids), [weight])
        expected += 11 * grad.square() / 2
    (found,) = squared_gradients(split, [weight], batches)
    torch.testing.assert_close(found, expected)
    scores = Fisher(["W2A16_G32"], start="rtn", unit="layer").score(split, layer_refs(split.model), batches)
    error = (MinMax(preset("W2A16_G32").weight, weight.shape)(weight) - weight).detach()
    cost = scores.cost["model.layers.0.self_attn.k_proj"]["W2A16_G32"]
    assert cost == pytest.approx(0.5 * float((expected * error.square()).sum()), rel=1e-3)
    trace = Fisher(unit="layer").score(split, layer_refs(split.model), batches)
    assert trace.importance["model.layers.0.self_attn.k_proj"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert not trace.cost and all(parameter.grad is None for parameter in split.parameters())


def test_hutchinson_finds_the_trace_that_a_whole_hessian_has():
    split = split_model()
    batches = [text(rows=1, tokens=16)]
    weight = split.model.get_submodule("model.layers.1.input_layernorm").weight  # 64 numbers: the Hessian is small
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (grad,) = torch.autograd.grad(mean_loss(split, weight, batches[0].input_ids), [weight], create_graph=True)
        rows = [torch.autograd.grad(g, [weight], retain_graph=True)[0][i] for i, g in enumerate(grad)]
    trace = float(torch.stack(rows).sum())
    (found,) = hutchinson(split, [weight], batches, 200, seed=0)
    assert found == pytest.approx(trace, rel=0.15)


def test_hessian_costs_are_mean_trace_times_squared_error():
    split, batches = split_model(), [text(rows=1, tokens=12)]
    refs = layer_refs(split.model)
    mean = HessianTrace(num_probes=2, unit="layer").score(split, refs, batches).importance
    scores = HessianTrace(SCHEMES, num_probes=2, start="rtn", unit="layer").score(split, refs, batches)
    name = "model.layers.0.mlp.up_proj"
    weight = split.model.get_submodule(name).weight
    error = (MinMax(preset("W2A16_G32").weight, weight.shape)(weight) - weight).detach()
    assert scores.cost[name]["W2A16_G32"] == pytest.approx(0.5 * mean[name] * float(error.square().sum()), rel=1e-3)


def test_an_encoder_is_refused_where_next_tokens_are_needed():
    split = SplitModel(toy_model("bert")).eval()
    for scorer in (OutputKL(SCHEMES), Fisher(), HessianTrace()):
        with pytest.raises(ValueError, match="needs a causal language model"):
            scorer.score(split, layer_refs(split.model), texts(1))
    assert all(map(math.isfinite, LIM().score(split, layer_refs(split.model), texts(1)).importance.values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LIM(unit="layer"), "LIM: unit is block, not 'layer'"),
        (lambda: LIM(aggregate="mean"), "per_token, per_sample, flattened"),
        (lambda: ZD(sides="three"), "one_sided or two_sided"),
        (lambda: OutputKL([]), "give schemes to measure"),
        (lambda: OutputKL(SCHEMES, mode="all"), "leave_one_in or leave_one_out"),
        (lambda: WeightSQNR(["W4A16", "W4A16"]), "different ones"),
        (lambda: Fisher(["W4A17"]), "no preset"),
        (lambda: HessianTrace(num_probes=0), "at least 1"),
        (lambda: OutputKL(SCHEMES, start="best"), "start is rtn or mse"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scheme_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match=r"score: layer model\.layers\.0\.self_attn\.q_proj: group_size 128"):
        WeightSQNR(["W4A16_G128"]).score(split_model(), layer_refs(split_model().model))
