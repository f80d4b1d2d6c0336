"""FakeQuantEmbedding: rows on the grid; tied to a head, the two share one weight and one fake quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.initializers import RTN
from kdqat.models.roles import embedding_refs
from kdqat.models.toy import TOYS, toy_model
from kdqat.quant import LSQ, FakeQuantLinear, MinMax, apply_plan, full_precision, strip_fake_quant
from kdqat.quant.embedding import FakeQuantEmbedding
from kdqat.quant.swap import fake_quant_layers
from kdqat.spec import LayerScheme, QuantPlan
from kdqat.training.optim import parameter_groups
from kdqat.types import BlockView
from tests.quant.specs import make_spec

W4 = LayerScheme(weight=make_spec(4))
IDS = torch.tensor([[1, 5, 5], [9, 0, 2]])


class Tied(nn.Module):
    """An embedding, a linear, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp = nn.Embedding(10, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)))


def tied(quantizer=LSQ) -> Tied:
    model = apply_plan(Tied(), QuantPlan({"embed": W4, "head": W4}), quantizer)
    RTN().initialize(BlockView(None, fake_quant_layers(model)))
    return model


def rounded(weight: torch.Tensor) -> torch.Tensor:
    scale = (weight.abs().amax(1, keepdim=True) / 7).clamp(min=1e-6)  # the padding row is zero
    return (weight / scale).round() * scale


def test_every_row_has_its_own_scale_and_is_looked_up_on_its_grid():
    plain = nn.Embedding(10, 16, padding_idx=2)
    ours = FakeQuantEmbedding.wrap(plain, W4, MinMax)
    assert ours.weight is plain.weight and torch.equal(ours(IDS), rounded(plain.weight)[IDS])
    with full_precision(nn.ModuleList([ours])):
        assert torch.equal(ours(IDS), plain(IDS))
    unwrapped = ours.unwrap()
    assert type(unwrapped) is nn.Embedding and torch.equal(unwrapped(IDS), ours(IDS))
    assert set(unwrapped.state_dict()) == {"weight"}


def test_only_rows_that_were_looked_up_get_gradients_and_the_padding_row_none():
    ours = FakeQuantEmbedding.wrap(nn.Embedding(10, 16, padding_idx=2), W4, LSQ)
    RTN().initialize(BlockView(None, {"embed": ours}))
    (ours(IDS) + 1).square().sum().backward()
    hit = [row in (0, 1, 5, 9) for row in range(10)]
    assert [bool(row.any()) for row in ours.weight.grad] == hit
    assert [bool(row.any()) for row in ours.weight_fake_quantizer.scale.grad] == hit


@pytest.mark.parametrize("side", ["activation", "output"])
def test_ids_and_looked_up_rows_are_no_activations(side):
    scheme = LayerScheme(**{side: make_spec(8, "token", dynamic=True)})
    with pytest.raises(ValueError, match="layer embed: an embedding has only a weight to quantize"):
        apply_plan(Tied(), QuantPlan({"embed": scheme}), LSQ)


def test_tied_both_planned_share_one_weight_and_one_fake_quantizer():
    model = tied()
    assert isinstance(model.embed, FakeQuantEmbedding) and isinstance(model.head, FakeQuantLinear)
    assert model.embed.weight is model.head.weight
    assert model.embed.weight_fake_quantizer is model.head.weight_fake_quantizer


def test_a_shared_scale_learns_from_lookup_and_head_and_the_optimizer_holds_it_once():
    model, grads = tied(), []
    scale = model.embed.weight_fake_quantizer.scale
    for cut in ("embed", "head", None):
        hidden = model.mlp(model.embed(IDS))
        if cut == "embed":
            hidden = hidden.detach()
        table = model.head.fake_quantized_weight()
        out = hidden @ (table.detach() if cut == "head" else table).T
        (grad,) = torch.autograd.grad(out.square().sum(), scale)
        grads.append(grad)
    assert grads[0].any() and grads[1].any()
    torch.testing.assert_close(grads[2], grads[0] + grads[1])
    model(IDS).square().sum().backward()
    torch.testing.assert_close(scale.grad, grads[2])
    groups = {group["name"]: group["params"] for group in parameter_groups(model)}
    assert [id(p) for p in groups["scales"]] == [id(scale)]
    assert sum(p is model.embed.weight for p in groups["weights"]) == 1


@torch.no_grad()
def test_stripped_the_two_stay_tied():
    model = tied()
    quantized, latent = model(IDS), model.embed.weight
    strip_fake_quant(model)
    assert type(model.embed) is nn.Embedding and type(model.head) is nn.Linear
    assert model.embed.weight is model.head.weight and not torch.equal(model.embed.weight, latent)
    assert torch.equal(model(IDS), quantized)


@pytest.mark.parametrize(("planned", "other"), [("embed", "head"), ("head", "embed")])
def test_half_tied_is_refused_whichever_half(planned, other):
    model = Tied()
    with pytest.raises(ValueError, match=rf"layer {planned}: its weight is tied to {other}.*plan both"):
        apply_plan(model, QuantPlan({planned: W4}), LSQ)
    with pytest.raises(ValueError, match=r"both must have the same weight scheme"):
        apply_plan(model, QuantPlan({planned: W4, other: LayerScheme(weight=make_spec(8))}), LSQ)
    assert not fake_quant_layers(model)


def answer(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the hidden states of a model without a head."""
    return model(input_ids=ids)[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", TOYS)
def test_the_input_embedding_of_a_family_can_be_planned(kind):
    """Some of Gemma's embeddings multiply the rows that were looked up."""
    model, ids = toy_model(kind, tie=False).eval(), torch.arange(3, 40)[None]
    before = answer(model, ids)
    (ref,) = embedding_refs(model)
    apply_plan(model, QuantPlan({ref.name: W4}), MinMax)
    assert embedding_refs(model) == [ref]
    with full_precision(model):
        assert torch.equal(answer(model, ids), before)
    quantized = answer(model, ids)
    assert not torch.equal(quantized, before)
    assert torch.equal(answer(strip_fake_quant(model), ids), quantized)


def test_an_embedding_with_a_forward_of_its_own_is_refused():
    class Shifted(nn.Embedding):
        def forward(self, input):
            return super().forward(input) + 1

    with pytest.raises(ValueError, match=r"layer 0: it is a Shifted whose own forward would be lost; .*`ignore`"):
        apply_plan(nn.Sequential(Shifted(10, 16)), QuantPlan({"0": W4}), LSQ)
