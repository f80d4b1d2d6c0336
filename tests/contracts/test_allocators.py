"""The allocator contract, for every allocator in `kdqat.allocate`; a new file is found and imported.

An allocator whose constructor needs arguments gets them in ARGUMENTS; the function is called with an empty folder.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import kdqat.allocate
from kdqat.allocate import BitAllocator, ByImportance, FromCheckpoint, FromFile, Knapsack, Uniform
from kdqat.exporters import GPTQ
from kdqat.initializers import RTN
from kdqat.models import ModelSource, layer_refs
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, MinMax, apply_plan, measure_coverage, require_coverage
from kdqat.spec import QuantPlan, explain_allocation, preset_name
from kdqat.student import prepare_student
from tests.allocate.toy import layer_scores


def found_allocators() -> list[type[BitAllocator]]:
    found: set[type[BitAllocator]] = set()
    for module in pkgutil.walk_packages(kdqat.allocate.__path__, "kdqat.allocate."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, BitAllocator) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


def from_file(folder) -> FromFile:
    Uniform("W4A16", overrides={"down": "W8A16"}).allocate(layer_refs(toy_model("llama"))).save(folder)
    return FromFile(str(folder))


def by_importance(folder) -> ByImportance:
    layer_scores(lambda layer: float(layer.shape[0]), layer_refs(toy_model("llama"))).save(folder)
    return ByImportance(str(folder), ["W8A16_G32", "W4A16_G32"], average_bits=6.0)


def knapsack(folder) -> Knapsack:
    costs = {"W4A16_G32": lambda layer: float(layer.shape[0]), "W8A16_G32": lambda layer: 0.1}
    layer_scores(lambda layer: 0.0, layer_refs(toy_model("llama")), **costs).save(folder)
    return Knapsack(str(folder), average_bits=6.0)


def from_checkpoint(folder) -> FromCheckpoint:
    GPTQ().export(prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G32"), LSQ, RTN()), folder)
    return FromCheckpoint(str(folder))


ARGUMENTS = {
    FromCheckpoint: from_checkpoint,
    ByImportance: by_importance,
    Knapsack: knapsack,
    Uniform: lambda folder: Uniform("W4A16_G32", overrides={"v": "W8A16"}),
    FromFile: from_file,
}

every_allocator = pytest.mark.parametrize("cls", found_allocators(), ids=lambda cls: cls.__name__)


def test_the_walk_finds_the_allocators_and_all_of_them_are_public():
    assert (
        {"Uniform", "FromFile", "ByImportance", "Knapsack"}
        <= {cls.__name__ for cls in found_allocators()}
        <= set(kdqat.allocate.__all__)
    )


@every_allocator
def test_every_layer_is_planned_or_ignored_and_never_both(cls, tmp_path):
    layers = layer_refs(toy_model("llama"))
    plan = ARGUMENTS[cls](tmp_path).allocate(layers)
    names = [layer.name for layer in layers]
    assert sorted([*plan, *plan.ignored]) == sorted(names) and len(set(names)) == len(names) == 15
    assert plan.ignored == ("lm_head",)


@every_allocator
def test_the_plan_fits_the_model_it_was_made_for(cls, tmp_path):
    model = toy_model("llama")
    plan = ARGUMENTS[cls](tmp_path).allocate(layer_refs(model))
    apply_plan(model, plan, MinMax)
    require_coverage(measure_coverage(model, set(plan.ignored).__contains__))


@every_allocator
def test_it_is_repeatable_and_gives_an_equal_plan_after_a_round_trip(cls, tmp_path):
    layers = layer_refs(toy_model("llama"))
    allocator = ARGUMENTS[cls](tmp_path)
    plan = allocator.allocate(layers)
    assert allocator.allocate(layers) == plan == QuantPlan.from_json(plan.to_json())
    assert plan.average_bits(layers) > plan.nominal_bits(layers) >= 4


@every_allocator
def test_its_reasons_name_every_layer_that_a_budget_decided_and_its_scheme(cls, tmp_path):
    layers = layer_refs(toy_model("llama"))
    allocator = ARGUMENTS[cls](tmp_path)
    plan, content = allocator.allocate(layers), allocator.explain(layers)
    if content is None:
        return
    assert content["allocator"] == cls.__name__ and content["used_bits"] <= content["budget_bits"]
    named = {name: choice["scheme"] for choice in content["choices"] for name in choice["layers"]} | content["fixed"]
    assert named == {name: preset_name(scheme) for name, scheme in plan.items()}
    assert all(row["why"] for row in explain_allocation(content))
