"""What the verbs write, read and print, through the real command line (fork_server.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.cli.fork_server import ROOT, run, server
from tests.cli.recipes import DROP, write

OUTPUTS = {"prepared", "checkpoints", "metrics.csv", "student", "eval.json", "export", "validation.json"}


def kdqat_in_python(folder: Path, *argv: str) -> tuple[str, list[str]]:
    """What a command prints in a Python of its own, and which heavy packages it imported."""
    code = (
        "import sys\nfrom kdqat.cli.main import main\n"
        f"try: main({list(argv)!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print('\\n@', [n for n in ('torch', 'transformers', 'lightning', 'numpy') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
    text, _, imported = out.stdout.rpartition("\n@ ")
    return text, yaml.safe_load(imported)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and, in run/, everything that quantize, fit and validate write for it."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder)
    run(folder, "quantize", "recipe.yaml")
    (folder / "fit.out").write_text(run(folder, "fit", "recipe.yaml"))
    run(folder, "validate", "recipe.yaml")
    return folder


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["fit", "--help"], ["report", "run"]])
def test_help_version_and_report_do_not_import_torch(argv: list[str], finished: Path) -> None:
    text, imported = kdqat_in_python(finished, *argv)
    assert imported == [] and text.strip()


def test_help_names_every_verb_and_how_to_override() -> None:
    text, _ = kdqat_in_python(ROOT, "--help")
    for word in ("quantize", "fit", "validate", "eval", "export", "generate", "report", "--trainer.max_steps 50"):
        assert word in text


@pytest.mark.parametrize(
    ("argv", "written"),
    [
        (["quantize"], {"prepared"}),
        (["fit"], {"checkpoints", "metrics.csv", "student", "eval.json", "baseline.json", "export", "tensorboard"}),
    ],
)
def test_verbs_write_what_the_table_of_the_run_directory_says(
    argv: list[str], written: set[str], tmp_path: Path
) -> None:
    write(tmp_path)
    run(tmp_path, *argv, "recipe.yaml")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"recipe.yaml", "environment.json", *written}


def test_a_run_without_evaluation_and_export_writes_none(tmp_path: Path) -> None:
    write(tmp_path, evaluate=DROP, export=None)
    run(tmp_path, "fit", "recipe.yaml")
    assert {p.name for p in (tmp_path / "run").iterdir()} & OUTPUTS == {"checkpoints", "metrics.csv", "student"}


def test_no_file_is_left_under_a_temporary_name(finished: Path) -> None:
    names = [p.name for p in (finished / "run").rglob("*")]
    assert not [name for name in names if name.startswith(".") or name.endswith((".part", ".old"))]


def test_saved_folders_load_as_plain_hugging_face_models_and_carry_their_plan(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("prepared", "student", "export/dequantized"):
        folder = finished / "run" / name
        assert (folder / "quant_plan.json").is_file()
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
        assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"]


def test_environment_says_what_made_the_run(finished: Path) -> None:
    facts = json.loads((finished / "run" / "environment.json").read_text())
    assert facts["command"].startswith("kdqat ") and facts["python"] == sys.version.split()[0]
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert re.fullmatch(r"[0-9a-f]{12}\+?", facts["commit"]) if (ROOT / ".git").exists() else True
    assert facts["hardware"] and facts["cpus"] == os.cpu_count()


def test_the_stored_recipe_is_complete_and_is_a_recipe(finished: Path, tmp_path: Path) -> None:
    stored = yaml.safe_load((finished / "run" / "recipe.yaml").read_text())
    assert stored["model"]["plan"]["init_args"]["ignore"] == ["lm_head"]  # a default, written down
    stored["trainer"]["default_root_dir"] = "again"
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(stored))
    run(tmp_path, "quantize", "stored.yaml")
    again = load_file(tmp_path / "again" / "prepared" / "model.safetensors")
    before = load_file(finished / "run" / "prepared" / "model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_print_config_prints_the_resolved_recipe_and_runs_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    printed = yaml.safe_load(run(tmp_path, "fit", "recipe.yaml", "--print_config", "--trainer.max_steps", "7"))
    assert printed["trainer"]["max_steps"] == 7
    assert printed["model"]["scale_lr_ratio"] == 0.1
    assert printed["model"]["quantizer"]["class_path"] == "kdqat.LSQ"
    assert not (tmp_path / "run").exists()


def stored_after(folder: Path, *argv: str) -> dict[str, Any]:
    run(folder, "quantize", "recipe.yaml", *argv)
    return yaml.safe_load((folder / "run" / "recipe.yaml").read_text())


def test_dotted_overrides_reach_every_depth(tmp_path: Path) -> None:
    write(tmp_path)
    stored = stored_after(
        tmp_path, "--model.plan.scheme", "W3A16_G32", "--model.quantizer.gradient_scale", "layer",
        "--model.student.path", "toy:qwen3", "--data.seq_len=16", "--seed_everything", "7", "--model.teacher", "null",
    )  # fmt: skip
    assert stored["model"]["plan"]["init_args"]["scheme"] == "W3A16_G32"
    assert stored["model"]["quantizer"]["init_args"]["gradient_scale"] == "layer"
    assert stored["model"]["student"]["path"] == "toy:qwen3" and stored["model"].get("teacher") is None
    assert stored["data"]["init_args"]["seq_len"] == 16 and stored["seed_everything"] == 7
    plan = json.loads((tmp_path / "run" / "prepared" / "quant_plan.json").read_text())
    assert list(plan["schemes"]) == ["W3A16_G32"]


def test_a_class_that_an_override_names_is_no_other_recipe_in_the_run_directory(tmp_path: Path) -> None:
    write(tmp_path)
    stored = stored_after(tmp_path, "--model.initializer", "RTN")  # the recipe's MSEGrid had arguments, RTN has none
    assert stored["model"]["initializer"] == {"class_path": "kdqat.RTN"}
    run(tmp_path, "eval", "run")


def test_keys_of_a_second_recipe_win(tmp_path: Path) -> None:
    write(tmp_path)
    second = {"trainer": {"max_steps": 9}, "model": {"plan": {"init_args": {"scheme": "W2A16_G32"}}}}
    write(tmp_path, second, name="second.yaml")
    stored = stored_after(tmp_path, "--config", "second.yaml")
    assert stored["trainer"]["max_steps"] == 9 and stored["trainer"]["accelerator"] == "cpu"
    assert stored["model"]["plan"]["init_args"]["scheme"] == "W2A16_G32"


def test_a_text_file_is_named_in_a_recipe_and_not_read_into_it(tmp_path: Path) -> None:
    text = "once upon a time\nthere was a text that is valid YAML. " * 20
    (tmp_path / "my.txt").write_text(text)
    path = write(tmp_path, data__init_args__text="my.txt")
    run(tmp_path, "fit", str(path))
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert stored["data"]["init_args"]["text"] == "my.txt"


RECIPES = [  # a study is not one: it names one (tests/recipes/test_smollm2_study.py)
    path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "recipe" not in yaml.safe_load(path.read_text())
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_parses_builds_and_says_how_to_run_it(path: Path) -> None:
    from kdqat.cli.parser import parse_recipe

    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert re.search(rf"kdqat \w+ {re.escape(str(path.relative_to(ROOT)))}", path.read_text())
    recipe = parse_recipe(path)
    assert recipe.model.source.path
    assert not recipe.run.path.is_relative_to(ROOT / "recipes")


def test_eval_says_what_fit_said_of_the_same_student(finished: Path) -> None:
    after_fit = json.loads((finished / "run" / "eval.json").read_text())
    assert (finished / "fit.out").read_text() == run(finished, "eval", "run", "--overwrite")
    assert json.loads((finished / "run" / "eval.json").read_text()) == after_fit
    assert after_fit["folder"] == "student" and set(after_fit["models"]) == {"rtn", "student"}


def test_a_run_directory_stands_for_its_recipe(finished: Path) -> None:
    run(finished, "eval", "run", "--overwrite")
    run(finished, "export", "run", "--overwrite")
    assert run(finished, "generate", "run", "Hello", "--max_new_tokens", "4").startswith("Hello")
    by_recipe = run(finished, "generate", "recipe.yaml", "Hello", "--max_new_tokens", "4")
    assert by_recipe == run(finished, "generate", "run", "Hello", "--max_new_tokens", "4")


def test_a_run_directory_may_move(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished / "run", tmp_path / "elsewhere")
    run(tmp_path, "eval", "elsewhere", "--overwrite")
    assert {p.name for p in tmp_path.iterdir()} - {".stdout", ".stderr"} == {"elsewhere"}


def test_evaluation_may_change_after_training(finished: Path) -> None:
    write(finished, name="more.yaml", evaluate=[
        {"class_path": "Perplexity", "init_args": {"text": "kdqat:prose", "seq_len": 16, "limit": 2, "label": "short"}}
    ])  # fmt: skip
    before = (finished / "run" / "eval.json").read_text()
    try:
        assert "| short | student |" in run(finished, "eval", "more.yaml", "--overwrite")
    finally:
        (finished / "run" / "eval.json").write_text(before)


def test_fit_starts_from_the_prepared_student_and_learns_from_the_source(tmp_path: Path) -> None:
    frozen = {"model__optimizer__init_args__lr": 0.0, "model__optimizer__init_args__weight_decay": 0.0}
    write(tmp_path, **frozen)
    run(tmp_path, "quantize", "recipe.yaml")
    path = tmp_path / "run" / "prepared" / "model.safetensors"
    other = {name: 1.25 * value for name, value in load_file(path).items()}
    save_file(other, path, {"format": "pt"})
    run(tmp_path, "fit", "recipe.yaml")
    trained = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(torch.equal(trained[name], other[name]) for name in other)  # lr 0: where it started from
    numbers = json.loads((tmp_path / "run" / "eval.json").read_text())["models"]["student"]["kdqat:prose"]
    write(tmp_path, name="plain.yaml", trainer__default_root_dir="plain", **frozen)
    run(tmp_path, "fit", "plain.yaml")
    plain = json.loads((tmp_path / "plain" / "eval.json").read_text())["models"]["student"]["kdqat:prose"]
    assert numbers["teacher_perplexity"] == plain["teacher_perplexity"]
    assert numbers["kl_mean"] > 2 * plain["kl_mean"]


def test_quantize_before_fit_changes_nothing_but_the_place_of_the_work(finished: Path, tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, "fit", "recipe.yaml")
    for name in ("model.safetensors", "quantizers.safetensors"):
        alone, after = (load_file(folder / "run" / "student" / name) for folder in (tmp_path, finished))
        assert all(torch.equal(alone[key], after[key]) for key in alone | after)


def test_validate_writes_numbers_of_the_student_on_the_validation_rows(finished: Path) -> None:
    numbers = json.loads((finished / "run" / "validation.json").read_text())
    assert numbers["student"] == "student"
    assert numbers["val/perplexity"] > 1 and numbers["val/kl"] > 0


def test_report_is_markdown_or_json(finished: Path) -> None:
    page, _ = kdqat_in_python(finished, "report", "run")
    for words in ("# run", "14 layers quantized (W4A16_G32)", "| kdqat:prose | student |", "val/kl", "dequantized"):
        assert words in page
    (facts,) = json.loads(kdqat_in_python(finished, "report", "run", "--json")[0])
    stored = json.loads((finished / "run" / "eval.json").read_text())
    assert facts["eval"] == stored and facts["exports"] == ["dequantized"]
    assert facts["validation"]["val/kl"] > 0 and "train/loss" in facts["last_metrics"]


def test_report_on_two_runs_and_on_an_unfinished_one(finished: Path, tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, "quantize", "recipe.yaml")
    page = run(tmp_path, "report", "run", str(finished / "run"))
    assert page.count("layers quantized") == 2 and page.count("| student |") == 1


def test_a_real_model_goes_through_every_verb(tmp_path: Path) -> None:
    from tests.cli.recipes import stories

    write(tmp_path, model__student__path=str(stories()), model__plan__init_args__scheme="W4A16",
          data__init_args__batch_size=4)  # fmt: skip
    for verb in ("quantize", "fit", "validate"):
        run(tmp_path, verb, "recipe.yaml")
    facts = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert facts["models"]["student"]["kdqat:prose"]["kl_mean"] < 1
    assert "Once upon" in run(tmp_path, "generate", "run", "Once upon a time", "--max_new_tokens", "8")


def test_a_traceback_is_kept_for_who_asks(tmp_path: Path) -> None:
    done = server().run(tmp_path, "eval", "none.yaml", KDQAT_TRACEBACK="1")
    assert done.code == 1 and "Traceback" in done.err and "no such recipe" in done.err
