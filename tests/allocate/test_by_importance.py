"""ByImportance: the paper's k, budgets that are met or named, families, orders, more than two levels."""

from __future__ import annotations

import math
import re

import pytest

from kdqat.allocate import ByImportance
from kdqat.allocate.families import families_of
from kdqat.spec import QuantPlan, describe_budget, explain_allocation, preset
from kdqat.types import EMBEDDING, LayerRef
from tests.allocate.toy import SHAPES, block_scores, layer_scores, llama

LEVELS = ["W4A16_G64", "W2A16_ASYM_G64"]  # 4.25 and 2.28125 counted bits


def bits_by_block(plan, num_blocks=4):
    return [plan[f"model.layers.{i}.mlp.down_proj"].weight.bits for i in range(num_blocks)]


@pytest.mark.parametrize(("num_blocks", "k"), [(32, 24), (40, 30)])
def test_the_papers_examples_at_a_nominal_average_of_3_5_bits(num_blocks, k):
    scores = block_scores([float(-i) for i in range(num_blocks)])
    plan = ByImportance(scores, LEVELS, average_bits=3.5, count="nominal").allocate(llama(num_blocks))
    assert bits_by_block(plan, num_blocks) == [4] * k + [2] * (num_blocks - k)
    assert plan.nominal_bits(llama(num_blocks)) == 3.5 < plan.average_bits(llama(num_blocks))


def test_the_highest_scores_get_the_high_level_and_reversed_gives_it_to_the_lowest():
    scores = block_scores([0.3, -0.9, 5.0, 0.1])
    assert bits_by_block(ByImportance(scores, LEVELS, average_bits=3.3).allocate(llama())) == [4, 2, 4, 2]
    turned = ByImportance(scores, LEVELS, average_bits=3.3, order="reversed")
    assert bits_by_block(turned.allocate(llama())) == [2, 4, 2, 4]


def test_a_random_order_is_the_seeds_and_asks_nothing_of_the_scores():
    plans = {}
    for seed in range(8):
        for scores in (block_scores([1.0, 2.0, 3.0, 4.0]), block_scores([4.0, 3.0, 2.0, 1.0])):
            allocator = ByImportance(scores, LEVELS, average_bits=3.3, order="random", seed=seed)
            plans.setdefault(seed, []).append(tuple(bits_by_block(allocator.allocate(llama()))))
    assert all(first == second for first, second in plans.values()) and len({p[0] for p in plans.values()}) > 2


@pytest.mark.parametrize("average_bits", [2.29, 2.5, 3.0, 3.17, 4.0, 4.25])
def test_counted_bits_stay_within_the_budget_and_no_upgrade_that_fits_is_left_out(average_bits):
    layers = llama()
    scores = layer_scores(lambda layer: sum(layer.name.encode()) % 7, layers)
    plan = ByImportance(scores, LEVELS, average_bits=average_bits).allocate(layers)
    numel = sum(math.prod(layer.shape) for layer in layers if layer.name in plan)
    left = (average_bits - plan.average_bits(layers)) * numel
    low = [layer for layer in layers if layer.name in plan and plan[layer.name].weight.bits == 2]
    steps = [sum(math.prod(layer.shape) for layer in family) * (4.25 - 2.28125) for family in families_of(low)]
    assert left >= 0 and all(step > left for step in steps)


def test_megabytes_are_those_of_the_planned_weights():
    layers, scores = llama(), block_scores([1.0, 2.0, 3.0, 4.0])
    plan = ByImportance(scores, LEVELS, megabytes=0.07).allocate(layers)
    numel = sum(math.prod(layer.shape) for layer in layers if layer.name in plan)
    assert plan.average_bits(layers) * numel / 8e6 <= 0.07 and bits_by_block(plan) == [2, 4, 4, 4]
    assert set(bits_by_block(ByImportance(scores, LEVELS, megabytes=9.0).allocate(layers))) == {4}  # more than enough


@pytest.mark.parametrize("low", ["W2A16_ASYM_G64", "W2A16"])  # 2.28125 counted bits, and 2.2222...
@pytest.mark.parametrize("key", ["average_bits", "megabytes"])
def test_a_budget_below_the_lowest_level_names_the_nearest_one_which_then_works(key, low):
    scores, levels = block_scores([1.0, 2.0, 3.0, 4.0]), ["W4A16_G64", low]
    with pytest.raises(ValueError, match="too few: the lowest schemes take") as error:
        ByImportance(scores, levels, **{key: 0.01}).allocate(llama())
    nearest = float(re.search(rf"take ([\d.]+) {key}", str(error.value))[1])
    assert set(bits_by_block(ByImportance(scores, levels, **{key: nearest}).allocate(llama()))) == {2}


def test_an_average_above_the_highest_level_names_the_nearest_one_which_then_works():
    scores = block_scores([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match=r"too many: the highest schemes take 4\.250000 average_bits"):
        ByImportance(scores, LEVELS, average_bits=5.0).allocate(llama())
    assert set(bits_by_block(ByImportance(scores, LEVELS, average_bits=4.25).allocate(llama()))) == {4}
    with pytest.raises(ValueError, match="outside 2 to 4; the nearest is 4"):
        ByImportance(scores, LEVELS, average_bits=4.25, count="nominal").allocate(llama())


def test_families_share_a_scheme_unless_they_are_untied_and_the_plan_states_them():
    layers = llama(2)
    scores = layer_scores(lambda layer: float(layer.role == "v"), layers)  # only the v layers matter
    plan = ByImportance(scores, LEVELS, average_bits=2.5).allocate(layers)
    schemes = {name: plan[f"model.layers.0.self_attn.{name}_proj"].weight.bits for name in "qkvo"}
    assert schemes == {"q": 4, "k": 4, "v": 4, "o": 2}
    assert plan.families[0] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert len(plan.families) == 4 and QuantPlan.from_json(plan.to_json()) == plan
    untied = ByImportance(scores, LEVELS, average_bits=2.4, tie_families=False).allocate(layers)
    schemes = {name: untied[f"model.layers.0.self_attn.{name}_proj"].weight.bits for name in "qkvo"}
    assert schemes["v"] == 4 and schemes["q"] == 2
    assert all("mlp" in name for family in untied.families for name in family)  # qkv are no longer one


def test_the_experts_of_a_layer_are_one_family_and_shared_experts_are_not_theirs():
    names = ["experts.gate_up_proj", "experts.down_proj", "shared_expert.gate_proj", "shared_expert.up_proj"]
    roles = ["gate_up", "down", "gate", "up"]
    layers = [LayerRef(f"model.layers.{i}.mlp.{name}", i, role, (8, 8)) for i in (0, 1) for name, role in
              zip(names, roles, strict=True)]  # fmt: skip
    assert [[layer.role for layer in family] for family in families_of(layers)] == 2 * [
        ["gate_up", "down"], ["gate", "up"]]  # fmt: skip
    unfused = [LayerRef(f"b.experts.{e}.{role}_proj", 0, role, (8, 8)) for e in (0, 1) for role in ("gate", "down")]
    assert len(families_of(unfused)) == 1


def test_overrides_are_kept_and_paid_for_and_a_family_they_split_is_not_stated():
    layers, scores = llama(), block_scores([1.0, 2.0, 3.0, 4.0])
    plan = ByImportance(scores, LEVELS, average_bits=3.3, overrides={"v": "W8A16"}).allocate(layers)
    assert all(plan[f"model.layers.{i}.self_attn.v_proj"] == preset("W8A16") for i in range(4))
    assert bits_by_block(plan) == [2, 2, 2, 4]  # block 2 does not fit beside the overrides; without them it does
    assert plan.average_bits(layers) <= 3.3
    assert all("mlp" in name for family in plan.families for name in family)


def test_embeddings_count_in_the_average():
    table = LayerRef("model.embed_tokens", None, EMBEDDING, (300, 64))
    layers, scores = [*llama(), table], block_scores([1.0, 2.0, 3.0, 4.0])
    plan = ByImportance(scores, LEVELS, average_bits=3.3, embeddings="W8A16").allocate(layers)
    assert plan["model.embed_tokens"] == preset("W8A16") and plan.average_bits(layers) <= 3.3


def test_a_cache_before_rope_keeps_the_outputs_that_the_base_gives():
    scores = block_scores([1.0, 2.0, 3.0, 4.0])
    plan = ByImportance(scores, LEVELS, average_bits=3.3, kv_cache="KV8", kv_position="before_rope").allocate(llama())
    assert all(plan[f"model.layers.{i}.self_attn.k_proj"].output.format == "int8" for i in range(4))
    assert len(plan.families) == 8  # the weights of q, k and v are alike


def test_with_three_levels_the_lowest_step_of_all_but_the_least_important_comes_first():
    levels = ["W8A16", "W4A16", "W2A16"]
    scores = block_scores([float(-i) for i in range(40)])
    bits = bits_by_block(ByImportance(scores, levels, average_bits=4.9).allocate(llama(40)), 40)
    assert bits == sorted(bits, reverse=True) and bits[-1] == 2 and bits[0] == 8 and bits.count(4) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": ["W4A16"]}, "2 or more schemes"),
        ({"levels": ["W2A16", "W4A16"]}, "the highest first"),
        ({"levels": ["W4A16", "W4A16_G64"]}, "fewer bits"),
        ({}, "average_bits or megabytes"),
        ({"average_bits": 3.0, "megabytes": 1.0}, "one of the two"),
        ({"average_bits": -1.0}, "above 0"),
        ({"average_bits": 3.0, "order": "best"}, "order is score, reversed, random"),
        ({"megabytes": 3.0, "count": "nominal"}, "two levels and average_bits"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_a_model_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        ByImportance("scores.json", **{"levels": LEVELS, **arguments})


def test_scores_that_are_not_there_name_the_verb_that_writes_them(tmp_path):
    with pytest.raises(ValueError, match=r"scores\.json: no such file; `kdqat score RECIPE` writes it"):
        ByImportance(str(tmp_path / "scores.json"), LEVELS, average_bits=3.0).allocate(llama())


def test_scores_of_another_model_and_layers_without_a_score_are_named():
    with pytest.raises(ValueError, match=r"no layer 'model\.layers\.4\.self_attn\.q_proj'; are these another model's"):
        ByImportance(block_scores([1.0] * 5), LEVELS, average_bits=3.0).allocate(llama(4))
    with pytest.raises(ValueError, match="layer 'lm_head' has no score; put it into `ignore` or `overrides`"):
        ByImportance(block_scores([1.0] * 4), LEVELS, average_bits=3.0, ignore=[]).allocate(llama(4))


def test_a_scheme_that_does_not_fit_a_width_names_the_layer():
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: group_size 128"):
        ByImportance(block_scores([1.0] * 4), ["W4A16_G128", "W2A16_G128"], average_bits=3.0).allocate(llama(4))


def test_the_reasons_add_up_to_the_plan_and_read_as_rows():
    layers, scores = llama(), block_scores([0.3, -0.9, 5.0, 0.1])
    allocator = ByImportance(scores, LEVELS, average_bits=3.4, overrides={"o": "W8A16"})
    content, plan = allocator.explain(layers), allocator.allocate(layers)
    rows = explain_allocation(content)
    assert [row["unit"] for row in rows[:4]] == [f"model.layers.{i}" for i in (2, 0, 3, 1)]
    assert rows[0]["why"] == "rank 1 of 4 by Toy (score)" and rows[0]["layers"] == len(SHAPES) - 1
    assert len(rows) == 4 + 4 and rows[-1]["scheme"] == "W8A16"
    numel = sum(math.prod(layer.shape) for layer in layers if layer.name in plan)
    assert content["used_bits"] == pytest.approx(plan.average_bits(layers) * numel)
    assert content["budget_bits"] == pytest.approx(3.4 * numel) and "3.4 average bits" in describe_budget(content)
