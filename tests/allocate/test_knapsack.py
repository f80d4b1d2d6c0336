"""Knapsack: exactly what scipy's MILP finds, on random instances; budgets; families; scores that do not do."""

from __future__ import annotations

import random

import pytest

from kdqat.allocate import ByImportance, Knapsack
from kdqat.allocate.knapsack_solver import solve
from tests.allocate.toy import block_scores, layer_scores, llama


def instance(seed, num_items, num_options, costs):
    """Random sizes, on a lattice for even seeds; costs random, convex in the size, or negative too."""
    rng = random.Random(seed)
    items = []
    for _ in range(num_items):
        weight = rng.choice([64, 96, 256]) if seed % 2 == 0 else rng.uniform(50, 300)
        sizes = [weight * bits for bits in (2.25, 3.25, 4.25, 8.25)[:num_options]]
        scale = rng.lognormvariate(0, 2)
        priced = {
            "any": [rng.random() for _ in sizes],
            "convex": [scale * 4.0**-bits for bits in range(num_options)],
            "signed": [rng.gauss(0, 1) for _ in sizes],
        }[costs]
        items.append(list(zip(sizes, priced, strict=True)))
    lowest, highest = (sum(end(size for size, _ in item) for item in items) for end in (min, max))
    return items, lowest + rng.random() * (highest - lowest)


@pytest.mark.parametrize("costs", ["any", "convex", "signed"])
@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_one_that_scipys_milp_finds(seed, costs):
    optimize = pytest.importorskip("scipy.optimize")
    items, budget = instance(seed, num_items=14, num_options=2 + seed % 3, costs=costs)
    flat = [option for item in items for option in item]
    rows, at = [], 0
    for item in items:
        rows.append([float(at <= i < at + len(item)) for i in range(len(flat))])
        at += len(item)
    answer = optimize.milp(
        [cost for _, cost in flat],
        constraints=[
            optimize.LinearConstraint(rows, 1, 1),
            optimize.LinearConstraint([[size for size, _ in flat]], -1e300, budget),
        ],
        integrality=1,
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    chosen = solve(items, budget)
    assert sum(item[i][0] for item, i in zip(items, chosen, strict=True)) <= budget * (1 + 1e-8)
    ours = sum(item[i][1] for item, i in zip(items, chosen, strict=True))
    assert ours == pytest.approx(answer.fun, rel=1e-6, abs=1e-9)


def test_a_large_instance_takes_no_time():
    items, budget = instance(1, num_items=400, num_options=4, costs="convex")
    assert len(solve(items, budget)) == 400


def test_a_budget_that_just_holds_the_smallest_options_is_met_and_one_below_is_not():
    items, _ = instance(3, num_items=20, num_options=3, costs="any")
    lowest = sum(min(size for size, _ in item) for item in items)
    assert solve(items, lowest) == [0] * 20
    assert solve(items, lowest * 0.999) is None


NAMES = ("W4A16_G64", "W2A16_ASYM_G64")


def test_it_spends_where_a_ranking_by_importance_would_not():
    """Two blocks of little cost against one of much: only sums tell."""
    costs = [(0.0, 1.0), (0.0, 0.9), (0.0, 0.2), (0.0, 0.1)]
    scores = block_scores([0.0, 1.0, 2.0, 3.0], costs, NAMES)
    plan = Knapsack(scores, average_bits=3.3).allocate(llama())
    assert [plan[f"model.layers.{i}.self_attn.o_proj"].weight.bits for i in range(4)] == [4, 4, 2, 2]
    greedy = ByImportance(scores, list(NAMES), average_bits=3.3).allocate(llama())
    assert [greedy[f"model.layers.{i}.self_attn.o_proj"].weight.bits for i in range(4)] == [2, 2, 4, 4]


def test_costs_of_a_family_add_up_and_it_gets_one_scheme():
    layers = llama(2)
    cost = {"q": 1.0, "k": 1.0, "v": 1.0, "o": 1.0}
    scores = layer_scores(lambda layer: 0.0, layers, W4A16_G64=lambda layer: 0.0,
                          W2A16_ASYM_G64=lambda layer: cost.get(layer.role, 0.0))  # fmt: skip
    # room for the qkv of both blocks (8192 weights each), and not for an o (4096) beside them
    plan = Knapsack(scores, average_bits=2.28125 + 1.96875 * 2 * 8192 / (2 * 36864)).allocate(layers)
    high = {name.rpartition(".")[2] for name in plan if plan[name].weight.bits == 4}
    assert high == {"q_proj", "k_proj", "v_proj"} and len(plan.families) == 4
    untied = Knapsack(scores, average_bits=2.5, tie_families=False).allocate(layers)
    assert untied.average_bits(layers) <= 2.5


def test_only_the_schemes_asked_for_are_used():
    names = ("W8A16", "W4A16_G64", "W2A16_ASYM_G64")
    scores = block_scores([1.0] * 4, [(0.0, 0.5, 1.0)] * 4, names)
    plan = Knapsack(scores, schemes=["W4A16_G64", "W2A16_ASYM_G64"], average_bits=4.25).allocate(llama())
    assert {scheme.weight.bits for scheme in plan.values()} == {4}
    with pytest.raises(ValueError, match="W3A16 was not measured; there are costs of W8A16, W4A16_G64"):
        Knapsack(scores, schemes=["W3A16", "W8A16"], average_bits=4.0).allocate(llama())


def test_scores_without_costs_and_budgets_out_of_reach_are_refused():
    with pytest.raises(ValueError, match="Toy measured no costs; Knapsack needs scores of OutputKL"):
        Knapsack(block_scores([1.0] * 4), average_bits=3.0).allocate(llama())
    scores = block_scores([1.0] * 4, [(0.0, 1.0)] * 4, NAMES)
    with pytest.raises(ValueError, match=r"the lowest schemes take 2\.281250 average_bits"):
        Knapsack(scores, average_bits=2.0).allocate(llama())
    with pytest.raises(ValueError, match=r"the highest schemes take 4\.250000 average_bits"):
        Knapsack(scores, average_bits=4.5).allocate(llama())


def test_the_reasons_name_the_costs():
    scores = block_scores([1.0] * 4, [(0.0, 1.0), (0.0, 0.9), (0.0, 0.2), (0.0, 0.1)], NAMES)
    content = Knapsack(scores, average_bits=3.3).explain(llama())
    assert [choice["cost"] for choice in content["choices"]] == [0.0, 0.0, 0.2, 0.1]
    assert content["used_bits"] <= content["budget_bits"]
