"""The scorer contract, for every scorer in `kdqat.importance`; a new file is found and imported.

A scorer whose constructor needs arguments gets them in ARGUMENTS.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil

import pytest
import torch

import kdqat.importance
from kdqat.importance import ImportanceScorer, OutputKL, WeightSQNR
from kdqat.models import layer_refs
from kdqat.spec import Scores
from tests.calibrate.toy import split_model, texts


def found_scorers() -> list[type[ImportanceScorer]]:
    found: set[type[ImportanceScorer]] = set()
    for module in pkgutil.walk_packages(kdqat.importance.__path__, "kdqat.importance."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, ImportanceScorer) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


ARGUMENTS = {cls: {"schemes": ["W4A16_G32", "W2A16_G32"]} for cls in (OutputKL, WeightSQNR)}

every_scorer = pytest.mark.parametrize("cls", found_scorers(), ids=lambda cls: cls.__name__)


def scores_of(cls, split, unit="block", batches=None) -> Scores:
    scorer = cls(**ARGUMENTS.get(cls, {}), unit=unit)
    return scorer.score(split, layer_refs(split.model), texts(2) if batches is None else batches)


def test_the_walk_finds_the_scorers_and_all_of_them_are_public():
    found = {cls.__name__ for cls in found_scorers()}
    assert {"LIM", "ZD", "Fisher", "OutputKL"} <= found <= set(kdqat.importance.__all__)


@every_scorer
def test_every_unit_it_can_score_gets_a_finite_number_and_units_cover_the_blocks(cls):
    split = split_model()
    inside = [ref.name for ref in layer_refs(split.model) if ref.block is not None]
    for unit in cls.units:
        scores = scores_of(cls, split, unit)
        assert len(scores.importance) == (2 if unit == "block" else 14)
        assert [name for names in scores.members.values() for name in names] == inside
        assert scores.method == cls.__name__ and scores.settings["unit"] == unit


@every_scorer
def test_it_is_repeatable_and_survives_json(cls):
    split = split_model()
    scores = scores_of(cls, split)
    assert scores_of(cls, split) == scores == Scores.from_json(json.loads(json.dumps(scores.to_json())))


@every_scorer
def test_the_model_is_as_it_was(cls):
    split = split_model().train()
    before = {name: tensor.clone() for name, tensor in split.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in split.parameters()]
    scores_of(cls, split)
    assert split.training and wanted == [parameter.requires_grad for parameter in split.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in split.state_dict().items())
    assert all(parameter.grad is None for parameter in split.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in split.modules())


@every_scorer
def test_it_says_whether_it_needs_text(cls):
    split = split_model()
    if cls.needs:
        with pytest.raises(ValueError, match=f"{cls.__name__} needs text"):
            scores_of(cls, split, batches=[])
    else:
        assert scores_of(cls, split, batches=[]).text is None
    assert (scores_of(cls, split).text is None) == (not cls.needs)


@every_scorer
def test_more_bits_never_cost_more_where_candidates_are_measured(cls):
    scores = scores_of(cls, split_model())
    for unit, costs in scores.cost.items():
        assert costs["W4A16_G32"] < costs["W2A16_G32"] and list(costs) == list(scores.schemes), unit
