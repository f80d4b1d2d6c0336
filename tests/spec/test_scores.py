"""Scores and the families of a plan: JSON there and back, and data that is refused."""

from __future__ import annotations

import json

import pytest

from kdqat.spec import QuantPlan, Scores, preset, scheme_names
from tests.allocate.toy import block_scores


def test_scores_survive_a_file_and_a_folder_stands_for_it(tmp_path):
    scores = block_scores([0.5, -1.0], [(0.0, 1.0), (0.1, 2.0)], ("W4A16", "W2A16"))
    scores.save(tmp_path)
    assert Scores.load(tmp_path) == scores == Scores.load(tmp_path / "scores.json")
    assert scores.ranking() == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(number):
    with pytest.raises(ValueError, match=r"importance of model\.layers\.1 is"):
        block_scores([1.0, number])
    with pytest.raises(ValueError, match=r"a cost of model\.layers\.0"):
        block_scores([1.0], [(0.0, number)], ("W4A16", "W2A16"))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match=r"scores\.json: these are no scores of version 1"):
        Scores.load(tmp_path)


def test_schemes_have_the_presets_name_or_a_number():
    own = preset("W4A16_G64"), preset("NF4")
    assert list(scheme_names(list(own))) == ["W4A16_G64", "NF4"]


def test_a_plan_states_its_families_and_one_without_them_still_loads():
    layers = dict.fromkeys("abc", preset("W4A16"))
    plan = QuantPlan(layers, families=(("a", "b"),))
    data = json.loads(json.dumps(plan.to_json()))
    assert QuantPlan.from_json(data) == plan and data["families"] == [["a", "b"]]
    del data["families"]
    assert QuantPlan.from_json(data).families == ()


@pytest.mark.parametrize(("families", "message"), [((("a", "x"),), "'x' is in a family but not planned"),
                                                   ((("a", "b"), ("b", "c")), "'b' is in two families")])  # fmt: skip
def test_families_of_other_layers_are_refused(families, message):
    with pytest.raises(ValueError, match=message):
        QuantPlan(dict.fromkeys("abc", preset("W4A16")), families=families)
