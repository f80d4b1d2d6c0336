"""What a study file says is what is run: axes, products, names, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdqat.study import Study, Trial, trials, variations
from kdqat.study.settings import changed
from tests.study.cases import lr_of, study_of

LR = "model.optimizer.lr"
RECIPE: dict[str, Any] = {
    "model": {"plan": {"class_path": "Uniform", "init_args": {"scheme": "W4A16"}}},
    "evaluate": [{"class_path": "Perplexity", "init_args": {"limit": 4}}],
    "trainer": {"callbacks": [{"class_path": "Checkpoints"}]},
}


def names(study: Study) -> list[str]:
    return [variation.name for variation in variations(study)]


def full(study: Study) -> list[Trial]:
    return trials(study, variations(study), "full")


def test_axes_are_multiplied_and_names_say_where_a_run_lies(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary={LR: [1e-4, 1e-3], "model.plan.init_args.scheme": ["W4A16", "W3A16"]}, seeds=[0, 7])
    assert names(study) == [f"lr-{lr}_scheme-{s}" for lr in ("0.0001", "0.001") for s in ("W4A16", "W3A16")]
    runs = full(study)
    assert len(runs) == 8 and len({run.name for run in runs}) == 8 and len({run.settings_hash for run in runs}) == 8
    last = runs[-1]
    assert last.name == "lr-0.001_scheme-W3A16_seed-7"
    assert lr_of(last.recipe) == 1e-3 and last.recipe["model"]["plan"]["init_args"]["scheme"] == "W3A16"
    assert last.recipe["seed_everything"] == 7 and last.recipe["data"]["init_args"]["shuffle_seed"] == 7
    assert last.recipe["trainer"]["default_root_dir"] == str(tmp_path / "out" / "runs" / last.name)


def test_a_study_without_variations_is_its_recipe_with_every_seed(tmp_path: Path) -> None:
    assert [run.name for run in full(study_of(tmp_path, seeds=[1, 2]))] == ["base_seed-1", "base_seed-2"]


def test_numbers_may_be_written_as_1e_5(tmp_path: Path) -> None:
    study_of(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(path.read_text() + f"vary: {{{LR}: [1e-5, 3E-4, 2.0e-3, 1e+1, 2e1]}}\n")
    from kdqat.study import read_study

    assert [lr_of(run.recipe) for run in full(read_study(path))] == [1e-5, 3e-4, 2e-3, 10.0, 20.0]


def test_a_date_is_a_word_and_malformed_arguments_are_left_to_the_recipe_s_parser(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(
        path.read_text() + "vary: {data.text: [2024-05-01], model.quantizer: [{class_path: A, init_args: [1]}]}\n"
    )
    from kdqat.study import read_study

    (run,) = full(read_study(path))
    assert run.recipe["data"]["init_args"]["text"] == "2024-05-01" and len(run.settings_hash) == 64
    assert run.variation.name == "text-2024-05-01_quantizer-A" and study.vary == {}


def test_a_later_axis_may_change_a_part_of_what_an_earlier_one_sets(tmp_path: Path) -> None:
    plan = {"class_path": "Uniform", "init_args": {"scheme": "W4A16", "ignore": ["x"]}}
    (run,) = full(study_of(tmp_path, vary={"model.plan": {"u": plan}, "model.plan.scheme": ["W3A16"]}))
    assert run.recipe["model"]["plan"]["init_args"] == {"scheme": "W3A16", "ignore": ["x"]}


def test_scores_are_a_section_like_the_others(tmp_path: Path) -> None:
    from kdqat.cli import parser
    from kdqat.study import settings

    (run,) = full(study_of(tmp_path, vary={"score.scorer": [{"class_path": "LIM"}]}))
    assert run.recipe["score"] == {"scorer": {"class_path": "LIM"}} and parser.SECTIONS is settings.SECTIONS


def test_values_can_have_names_and_stand_for_several_settings(tmp_path: Path) -> None:
    freeze = {"class_path": "Freeze", "init_args": {"roles": ["o", "v"]}}
    study = study_of(
        tmp_path,
        recipe={"trainer__callbacks": [{"class_path": "Checkpoints"}]},
        vary={
            "freeze": {"none": {}, "ov": {"trainer.callbacks+": freeze, "trainer.precision": "bf16-mixed"}},
            "log": {"off": None, "on": {"trainer.callbacks+": [{"class_path": "GradientLog"}]}},
            "trainer.callbacks": {"kept": [{"class_path": "Checkpoints"}], "dropped": []},
        },
    )
    runs = {run.variation.name: run.recipe["trainer"] for run in full(study)}
    assert len(runs) == 8
    both = runs["freeze-ov_log-on_callbacks-kept"]
    assert both["callbacks"] == [{"class_path": "Checkpoints"}, freeze, {"class_path": "GradientLog"}]
    assert both["precision"] == "bf16-mixed"
    assert runs["freeze-ov_log-off_callbacks-dropped"]["callbacks"] == [freeze]
    assert runs["freeze-none_log-off_callbacks-kept"]["callbacks"] == [{"class_path": "Checkpoints"}]
    assert "precision" not in runs["freeze-none_log-off_callbacks-kept"]


def test_named_variations_make_groups_with_grids_of_their_own(tmp_path: Path) -> None:
    tensor = {"weight": {"format": "int4", "granularity": "tensor"}}
    half = {"set": {"trainer.precision": "16-mixed"}, "vary": {LR: [1e-5], "trainer.max_steps": [2, 4]}}
    groups = [{"name": "channel"}, {"name": "tensor", "set": {"model.plan.scheme": tensor}}, {"name": "fp16", **half}]
    study = study_of(tmp_path, vary={LR: [1e-4, 1e-3]}, variations=groups)
    assert names(study) == ["channel_lr-0.0001", "channel_lr-0.001", "tensor_lr-0.0001",
                            "tensor_lr-0.001", "fp16_lr-1e-05_max_steps-2", "fp16_lr-1e-05_max_steps-4"]  # fmt: skip
    runs = full(study)
    assert runs[2].recipe["model"]["plan"]["init_args"]["scheme"] == tensor
    assert runs[5].recipe["trainer"]["precision"] == "16-mixed" and runs[5].recipe["trainer"]["max_steps"] == 4
    assert runs[0].variation.labels == {"variation": "channel", "lr": 1e-4}


def test_short_runs_have_their_length_seeds_and_evaluation(tmp_path: Path) -> None:
    screen = {"max_steps": 2, "keep": 1, "set": {"evaluate": []}}
    study = study_of(tmp_path, vary={LR: [1e-4]}, seeds=[3, 4], screen=screen)
    (short,) = trials(study, variations(study), "screen")
    assert short.name == "screen_lr-0.0001_seed-3" and short.recipe["trainer"]["max_steps"] == 2
    assert short.recipe["evaluate"] == [] and full(study)[0].recipe["evaluate"] != []
    assert {run.recipe["trainer"]["max_steps"] for run in full(study)} == {3}


def test_the_recipe_is_not_changed_by_changing_it() -> None:
    made = changed(
        RECIPE, {"trainer.callbacks+": {"class_path": "A"}, "evaluate.0.limit": 2, "model.plan.scheme": "W3A16"}
    )
    assert [item["class_path"] for item in made["trainer"]["callbacks"]] == ["Checkpoints", "A"]
    assert made["evaluate"][0]["init_args"]["limit"] == 2 and made["model"]["plan"]["init_args"]["scheme"] == "W3A16"
    assert len(RECIPE["trainer"]["callbacks"]) == 1 and RECIPE["evaluate"][0]["init_args"]["limit"] == 4
    assert changed({}, {"model.parallel.compile_blocks": True}) == {"model": {"parallel": {"compile_blocks": True}}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modle.plan": 1}, "begins with a section"),
        ({"evaluate.3.limit": 1}, "has no '3'"),
        ({"seed_everything.x": 1}, "seed_everything"),
        ({"model.plan.scheme.weight": 1}, "W4A16"),
        ({"model.plan+": 1}, "appends to a list"),
    ],
)
def test_settings_that_lead_nowhere_are_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        changed({**RECIPE, "seed_everything": 0}, settings)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"metrik": 1}, "did you mean 'metric'"),
        ({"screen": {"keep": 1}}, "screen.max_steps: missing"),
        ({"screen": {"keep": 0, "max_steps": 2}}, "screen.keep must be at least 1"),
        ({"screen": {"keep": 1, "max_steps": 2, "per": ["freeze"]}, "vary": {LR: [1]}}, "screen.per: 'freeze'"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": []}, "different whole numbers"),
        ({"workers": True}, "workers: expected int"),
        ({"keep": ["students"]}, "did you mean 'student'"),
        ({"best": "smallest"}, "best is lowest or highest"),
        ({"vary": {LR: 1e-4}}, "expected a list of values"),
        ({"vary": {"freeze": ["none", "ov"]}}, "need a dotted key"),
        ({"vary": {"freeze": {"ov": [1]}}}, "a mapping of dotted keys"),
        ({"vary": {LR: [1e-4, 1e-4]}}, "two variations are called 'lr-0.0001'"),
        ({"variations": [{"set": {}}]}, "an entry has name"),
        ({"vary": {3: [1]}}, "vary: its keys are words, this is 3"),
        ({"set": {3: 4}}, "set: its keys are words, this is 3"),
        ({"screen": {"keep": 1, "max_steps": 2, "set": {3: 4}}}, r"screen\.set: its keys are words"),
        ({"vary": {"freeze": {"ov": {3: 4}}}}, "vary: freeze: ov: its keys are words"),
        ({"seed_keys": [3]}, "seed_keys: its items are words, this is 3"),
        ({"metrics": [3]}, "metrics: its items are words"),
        ({"keep": [["student"]]}, "keep: its items are words"),
        ({"variations": [3]}, "variations: its items are mappings of keys, this is 3"),
        ({"variations": [{"name": "a", "vary": [1]}]}, r"variations: a: vary: expected a mapping, this is \[1\]"),
        ({"variations": [{"name": "a", "set": [1]}]}, r"variations: a: set: expected a mapping, this is \[1\]"),
        ({"variations": [{"name": "a", "set": {1: 1}}]}, "variations: a: set: its keys are words"),
        ({"screen": {"keep": 1, "max_steps": 2, "per": [["a"]]}}, r"screen\.per: its items are words"),
        ({"vary": {LR: [1]}, "variations": [{"name": "a", "set": {LR: 5}}]}, f"variation a, lr 1: {LR} undoes {LR},"),
        (
            {"vary": {LR: [1]}, "variations": [{"name": "a", "set": {"model.optimizer.init_args.lr": 5}}]},
            r"undoes model\.optimizer\.init_args\.lr",
        ),
        (
            {"vary": {"plan": {"a": {"model.plan.scheme": "W4A16"}}, "model.plan": [{"class_path": "X"}]}},
            r"model\.plan undoes model\.plan\.scheme",
        ),
        ({"vary": {"trainer.callbacks": [[{"class_path": "X" * 200}]]}}, "too long"),
    ],
)
def test_bad_study_files_are_errors_that_name_the_key(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        full(study_of(tmp_path, **keys))


def test_axes_with_the_same_last_word_are_told_apart(tmp_path: Path) -> None:
    study = study_of(tmp_path, vary={"model.student.path": ["toy:llama"], "model.teacher.init_args.path": ["x"]})
    assert names(study) == ["student.path-toy-llama_init_args.path-x"]
