"""Putting a plan into a model and taking it out; on any error the model is untouched."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, FakeQuantLinear, MinMax, apply_plan, fake_quant_layers, full_precision, strip_fake_quant
from kdqat.spec import LayerScheme, QuantPlan, preset
from tests.quant.specs import make_spec

W4 = LayerScheme(weight=make_spec(4))
ASYM = LayerScheme(weight=make_spec(4, symmetric=False))


class Tied(nn.Module):
    """An embedding, two linears and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)))


IDS = torch.arange(10)


def test_planned_layers_are_swapped_and_no_other():
    model = Tied()
    assert apply_plan(model, QuantPlan({"mlp.2": W4}), MinMax) is model
    assert list(fake_quant_layers(model)) == ["mlp.2"]
    assert type(model.mlp[0]) is nn.Linear and type(model.head) is nn.Linear


def test_ties_hold_and_hf_keys_stay():
    model = toy_model("llama", tie=True)
    keys, weight = set(model.state_dict()), model.model.layers[0].mlp.up_proj.weight
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    apply_plan(model, QuantPlan(dict.fromkeys(names, W4)), LSQ)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight is weight
    assert {key for key in model.state_dict() if "_fake_quantizer." not in key} == keys
    assert len(fake_quant_layers(model)) == len(names) == 14


def unchanged(model: Tied) -> bool:
    return not fake_quant_layers(model) and [type(m) for m in model.mlp] == [nn.Linear, nn.GELU, nn.Linear]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"mlp.0": W4, "mlp.7": W4}, "no layer 'mlp.7'; was the plan made for another model"),
        (
            {"mlp.0": W4, "mlp.1": W4},
            "layer mlp.1: it is a GELU; linear layers, Conv1D, Conv2d, embeddings and the experts",
        ),
        ({"mlp.0": W4, "embed": W4}, "layer embed: its weight is tied to head, which stays in full precision"),
        ({"mlp.0": W4, "mlp.2": preset("W4A16_G32")}, "layer mlp.2: group_size 32 does not divide input width 24: use"),
        ({"mlp.0": W4, "head": W4}, "layer head: its weight is tied to embed, which stays in full precision"),
    ],
    ids=["unknown", "no weight", "half-tied embedding", "group size", "half-tied head"],
)
def test_a_plan_that_does_not_fit_names_the_layer_and_leaves_the_model_untouched(plan, message):
    model = Tied()
    with pytest.raises(ValueError, match=r".") as error:
        apply_plan(model, QuantPlan(plan), LSQ)
    assert message in str(error.value)
    assert unchanged(model)


def test_a_quantizer_that_refuses_a_later_layer_leaves_the_model_untouched():
    model = Tied()
    plan = QuantPlan({"mlp.0": ASYM, "mlp.2": W4})
    with pytest.raises(ValueError, match=r"layer mlp\.2: learn_zero_point=True needs"):
        apply_plan(model, plan, partial(LSQ, learn_zero_point=True))
    assert unchanged(model)


def test_the_half_tied_message_offers_both_ways_out():
    with pytest.raises(ValueError, match=r"ignore: \[lm_head\].*tie_word_embeddings: false"):
        apply_plan(Tied(), QuantPlan({"head": W4}), LSQ)


def test_two_tied_linears_go_together_or_not_at_all():
    def tied_pair() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        return model

    both = apply_plan(tied_pair(), QuantPlan({"0": W4, "1": W4}), LSQ)
    assert both[0].weight is both[1].weight
    for half in ({"0": W4}, {"0": W4, "1": LayerScheme()}):
        with pytest.raises(ValueError, match="tied to 1, which stays in full precision"):
            apply_plan(tied_pair(), QuantPlan(half), LSQ)


def test_an_embedding_and_the_head_tied_to_it_are_quantized_together_with_one_quantizer():
    model = apply_plan(Tied(), QuantPlan({"embed": W4, "head": W4}), LSQ)
    assert model.embed.weight is model.head.weight
    assert model.embed.weight_fake_quantizer is model.head.weight_fake_quantizer
    assert torch.equal(model.embed(IDS), model.head.fake_quantized_weight())
    plain = strip_fake_quant(model)
    assert type(plain.embed) is nn.Embedding and plain.embed.weight is plain.head.weight
    with pytest.raises(ValueError, match="both must have the same weight scheme"):
        apply_plan(Tied(), QuantPlan({"embed": W4, "head": ASYM}), LSQ)


def test_applying_a_plan_twice_is_refused_and_stripping_first_is_the_remedy():
    model = apply_plan(Tied(), QuantPlan({"mlp.0": W4}), MinMax)
    layer = model.mlp[0]
    with pytest.raises(ValueError, match=r"layer mlp\.0: it is fake-quantized already; strip_fake_quant first"):
        apply_plan(model, QuantPlan({"mlp.2": W4, "mlp.0": W4}), MinMax)
    assert model.mlp[0] is layer and list(fake_quant_layers(model)) == ["mlp.0"]
    apply_plan(strip_fake_quant(model), QuantPlan({"mlp.0": W4}), MinMax)


def test_the_root_may_be_the_layer_itself():
    linear, x = nn.Linear(16, 8), torch.randn(2, 16)
    layer = apply_plan(linear, QuantPlan({"": W4}), MinMax)
    assert isinstance(layer, FakeQuantLinear) and layer.weight is linear.weight
    assert list(fake_quant_layers(layer)) == [""]
    expected = layer(x)
    plain = strip_fake_quant(layer)
    assert type(plain) is nn.Linear and torch.equal(plain(x), expected)


def test_a_stripped_model_is_plain_and_computes_the_same_bit_for_bit():
    model = apply_plan(Tied(), QuantPlan({"mlp.0": W4, "mlp.2": ASYM}), MinMax)
    expected = model(IDS)
    assert strip_fake_quant(model) is model
    assert unchanged(model) and model.head.weight is model.embed.weight
    assert torch.equal(model(IDS), expected)


def test_inside_full_precision_the_latent_weights_compute_and_afterwards_the_grid_again():
    torch.manual_seed(0)
    model = Tied()
    full = model(IDS)
    apply_plan(model, QuantPlan({"mlp.0": W4, "mlp.2": W4}), MinMax)
    quantized = model(IDS)
    assert not torch.equal(full, quantized)
    with full_precision(model):
        assert torch.equal(model(IDS), full)
        with full_precision(model):
            assert torch.equal(model(IDS), full)
        assert torch.equal(model(IDS), full)
    assert torch.equal(model(IDS), quantized)


def test_full_precision_restores_every_layers_own_state_even_after_an_error():
    model = apply_plan(Tied(), QuantPlan({"mlp.0": W4, "mlp.2": W4}), MinMax)
    model.mlp[2].fake_quantize = False
    with pytest.raises(KeyError), full_precision(model):
        assert not model.mlp[0].fake_quantize
        raise KeyError
    assert model.mlp[0].fake_quantize and not model.mlp[2].fake_quantize
