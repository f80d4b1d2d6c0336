"""Every family's layers, blocks, body and head, on a toy of it: the one place that checks Hugging Face names."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from kdqat.models import block_prefix, blocks_of, family_of, layer_refs, select_layers
from kdqat.models.roles import FAMILIES, ROLES, embedding_refs
from kdqat.models.toy import TOYS, toy_model
from kdqat.quant import MinMax, apply_plan
from kdqat.spec import QuantPlan, preset
from kdqat.types import LayerRef

GATED = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN = ("q", "k", "v", "o", "up", "down")
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), GATED),
    **dict.fromkeys(("cohere", "granite"), GATED),
    **dict.fromkeys(("phi", "opt", "bert"), PLAIN),
    "phi3": ("qkv", "o", "gate_up", "down"),
    "gpt2": ("qkv", "o", "up", "down"),
    **dict.fromkeys(("mixtral", "qwen3_moe"), ("q", "k", "v", "o", "router", "gate_up", "down")),
    "qwen2_moe": ("q", "k", "v", "o", "router", "gate_up", "down", "gate", "up", "down", "router"),
}

every_family = pytest.mark.parametrize("kind", FAMILIES)


def test_every_family_has_a_toy_and_every_toy_a_family():
    assert set(TOYS) - {"bert_encoder"} == set(FAMILIES) == set(EXPECTED)  # tests/models/test_encoders.py


@every_family
def test_every_layer_of_every_block_has_its_role(kind):
    refs = layer_refs(toy_model(kind))
    for block in (0, 1):
        assert sorted(ref.role for ref in refs if ref.block == block) == sorted(EXPECTED[kind])
    outside = [ref for ref in refs if ref.block is None]
    assert {ref.role for ref in outside} == {"lm_head"}
    assert {ref.role for ref in refs} <= set(ROLES)
    assert max(ref.shape[0] for ref in outside) == 260


@every_family
def test_no_matmul_weight_is_overlooked(kind):
    """Counted independently of modules: every matrix or stack of matrices but the embeddings is some layer's weight."""
    model = toy_model(kind, tie=False)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = [p.flatten(0, -2).shape for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    # GPT-2 stores its matrices transposed
    assert Counter(tuple(sorted(ref.shape)) for ref in layer_refs(model)) == Counter(tuple(sorted(w)) for w in weights)


@every_family
def test_blocks_lie_under_the_prefix_in_order(kind):
    model = toy_model(kind)
    modules = dict(model.named_modules())
    assert blocks_of(model) == [modules[f"{block_prefix(model)}{i}"] for i in (0, 1)]
    assert all(ref.name.startswith(f"{block_prefix(model)}{ref.block}.") for ref in layer_refs(model) if ref.block)


@every_family
def test_body_and_head_are_submodules_and_the_head_makes_the_logits(kind):
    model, family = toy_model(kind).eval(), family_of(toy_model(kind))
    ids = torch.randint(3, 260, (2, 9))
    with torch.no_grad():
        hidden = model.get_submodule(family.body)(input_ids=ids).last_hidden_state
        assert model.get_submodule(family.head)(hidden).shape == (2, 9, 260)


@every_family
@pytest.mark.parametrize("tie", [True, False])
def test_the_input_embedding_is_a_layer_that_a_plan_can_name(kind, tie):
    model = toy_model(kind, tie=tie)
    (ref,) = embedding_refs(model)
    assert (ref.role, ref.block, ref.shape) == ("embedding", None, (260, 64))
    assert model.get_submodule(ref.name) is model.get_input_embeddings()
    assert ref.name not in {other.name for other in layer_refs(model)}


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_blocks_that_a_mixture_of_experts_leaves_dense_have_their_roles_too(kind):
    model = toy_model(kind)
    config = type(model.config)(**{**model.config.to_dict(), "mlp_only_layers": [0]})
    refs = layer_refs(type(model)(config))
    assert sorted(ref.role for ref in refs if ref.block == 0) == sorted(GATED)
    assert sorted(ref.role for ref in refs if ref.block == 1) == sorted(EXPECTED[kind])


def test_a_swapped_model_has_the_same_layers():
    model = toy_model("llama")
    before = layer_refs(model)
    apply_plan(model, QuantPlan({ref.name: preset("W4A16") for ref in before if ref.block is not None}), MinMax)
    assert layer_refs(model) == before


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model type None is not known: kdqat knows bert, .*qwen3.*roles\.py"):
        layer_refs(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", TOYS)
def test_a_toy_is_the_same_every_time_and_leaves_the_global_seed_alone(kind):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = toy_model(kind), toy_model(kind)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_block_that_is_not_there_is_named_as_it_was_asked_for():
    refs = [LayerRef("a.0", 0, "q", ()), LayerRef("a.1", 1, "q", ())]
    with pytest.raises(ValueError, match="Freeze: blocks -9 matches no layer of the plan; there are 0 to 1"):
        select_layers(refs, blocks=[-9], who="Freeze")
    assert select_layers(refs, blocks=[-1], who="Freeze") == refs[1:]
