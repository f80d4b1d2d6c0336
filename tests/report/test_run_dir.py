"""Who may write into a run directory, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdqat.report import RunDir, describe, environment, markdown, read_yaml, removed_share

RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"student": {"path": "toy:llama"}, "plan": "p", "quantizer": "q", "initializer": None, "loss": "l"},
    "data": {"seq_len": 8},
    "trainer": {"max_steps": 1, "default_root_dir": "run"},
    "evaluate": [],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    recipe = json.loads(json.dumps(RECIPE))
    *parents, last = path.split(".")
    place = recipe
    for parent in parents:
        place = place[parent]
    place[last] = value
    return recipe


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    directory = RunDir(tmp_path / "run")
    directory.make()
    directory.start("quantize", RECIPE, {}, overwrite=False)
    return directory


def test_a_verb_refuses_its_own_output_and_only_that(run: RunDir) -> None:
    run.prepared.mkdir()
    with pytest.raises(ValueError, match=r"prepared exists already: use --overwrite to replace it, or another"):
        run.claim("quantize", RECIPE)
    for verb in ("fit", "validate", "eval", "export"):
        run.claim(verb, RECIPE)
    run.claim("quantize", RECIPE, overwrite=True)


@pytest.mark.parametrize("name", ["checkpoints", "student", "metrics.csv"])
def test_fit_offers_to_resume(name: str, run: RunDir) -> None:
    (run.path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} exists already: use --overwrite to replace it or --resume"):
        run.claim("fit", RECIPE)
    run.claim("fit", RECIPE, resume=True)


@pytest.mark.parametrize(
    ("made", "verb", "key", "allowed"),
    [
        ("prepared", "fit", "model.plan", False),
        ("prepared", "fit", "model.student.path", False),
        ("prepared", "fit", "model.loss", True),  # quantize does not use it
        ("prepared", "fit", "data.seq_len", True),
        ("prepared", "quantize", "model.plan", True),  # with --overwrite: replaced
        ("student", "eval", "data.seq_len", False),
        ("student", "eval", "evaluate", True),
        ("student", "fit", "trainer.max_steps", True),  # with --overwrite: replaced
        ("student", "eval", "trainer.default_root_dir", True),  # a directory may be moved
        ("eval.json", "fit", "model.plan", True),
    ],
)
def test_a_recipe_may_change_where_no_earlier_verb_used_it(
    made: str, verb: str, key: str, allowed: bool, run: RunDir
) -> None:
    (run.path / made).mkdir()
    recipe = changed(key, "other")
    if allowed:
        run.claim(verb, recipe, overwrite=True)
        return
    with pytest.raises(ValueError, match=rf"the recipe differs from the one `kdqat \w+` used here in {key};"):
        run.claim(verb, recipe, overwrite=True)


def test_a_resumed_fit_needs_the_recipe_it_began_with(run: RunDir) -> None:
    run.checkpoints.mkdir()
    with pytest.raises(ValueError, match=r"`kdqat fit` used here in trainer\.max_steps"):
        run.claim("fit", changed("trainer.max_steps", 9), resume=True)


def test_overwriting_removes_the_verbs_own_output_and_the_numbers_about_it(run: RunDir) -> None:
    for name in ("prepared", "student", "checkpoints"):
        (run.path / name).mkdir()
    for name in ("eval.json", "validation.json", "metrics.csv", "baseline.json"):
        run.write_json(name, {})
    run.start("fit", RECIPE, {}, overwrite=True)
    assert {p.name for p in run.path.iterdir()} == {"prepared", "baseline.json", "recipe.yaml", "environment.json"}


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); choose another trainer.default_root_dir"):
        RunDir(tmp_path / "file" / "run").make()


def test_the_stored_recipe_is_the_recipe(run: RunDir) -> None:
    assert read_yaml(run.recipe) == RECIPE


@pytest.mark.parametrize(("text", "says"), [("a: [", "is no YAML"), ("- 1", "this is list"), ("", "this is NoneType")])
def test_what_is_no_recipe_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"x.yaml.*{says}"):
        read_yaml(tmp_path / "x.yaml")


def test_damaged_json_is_named_with_the_remedy(run: RunDir) -> None:
    assert run.read_json("eval.json") is None
    (run.path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json is damaged .*delete it and run the verb"):
        describe(run.path)


def test_a_run_that_has_just_begun_can_be_described(run: RunDir) -> None:
    facts = describe(run.path)
    assert facts["eval"] is None and facts["last_metrics"] == {} and facts["exports"] == []


def test_the_last_metrics_are_the_last_of_each_column(run: RunDir) -> None:
    (run.path / "metrics.csv").write_text("step,train/loss,val/kl\n0,1.0,\n1,0.5,0.25\n2,0.4,\n")
    assert describe(run.path)["last_metrics"] == {"step": "2", "train/loss": "0.4", "val/kl": "0.25"}


def test_environment_names_versions_and_hardware() -> None:
    facts = environment("a laptop")
    assert facts["hardware"] == "a laptop" and facts["versions"]["kdqat"] != "missing"
    assert yaml.safe_dump(facts)


def test_the_share_of_rtns_kl_that_is_gone() -> None:
    assert removed_share({"kl_mean": 0.4}, {"kl_mean": 0.1}) == pytest.approx(0.75)
    assert removed_share({"kl_mean": 0.4}, {"kl_mean": 0.8}) == pytest.approx(-1.0)
    for rtn, student in ((None, {"kl_mean": 1.0}), ({"kl_mean": 0.0}, {"kl_mean": 1.0}), ({"kl_mean": 1.0}, {})):
        assert removed_share(rtn, student) is None


def test_the_table_has_a_row_per_text_and_model_with_sizes() -> None:
    numbers = {"kl_mean": 0.1, "kl_p95": 0.3, "top1": 0.9, "perplexity": 12.0, "teacher_perplexity": 10.0}
    evaluation = {
        "models": {"rtn": {"t": {**numbers, "kl_mean": 0.4}}, "student": {"t": numbers, "u": {"perplexity": 1e6}}},
        "bytes": {"teacher": 4_000_000, "student": 1_000_000},
    }
    lines = markdown(evaluation).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines[2:]] == [
        ("t", "teacher", "10.00", "", "", "", "", "4.0"),
        ("t", "RTN", "12.00", "0.4000", "0.300", "90.0 %", "", "1.0"),
        ("t", "student", "12.00", "0.1000", "0.300", "90.0 %", "75.0 %", "1.0"),
        ("u", "student", "1.0e+06", "", "", "", "", "1.0"),
    ]
