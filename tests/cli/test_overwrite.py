"""What happens to a run directory that is run again: refused, replaced, resumed, never half lost."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.fork_server import run, server
from tests.cli.recipes import DROP, write


def test_a_second_run_refuses_and_overwrite_replaces_it(tmp_path: Path) -> None:
    write(tmp_path)
    first = run(tmp_path, "fit", "recipe.yaml")
    marker = tmp_path / "run" / "student" / "marker"
    marker.touch()
    assert server().run(tmp_path, "fit", "recipe.yaml").code == 2
    assert marker.exists()
    assert run(tmp_path, "fit", "recipe.yaml", "--overwrite") == first
    assert not marker.exists()
    assert len(list((tmp_path / "run" / "checkpoints").glob("*"))) == 1


def test_an_overwritten_student_takes_its_numbers_with_it(tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, "fit", "recipe.yaml")
    run(tmp_path, "validate", "recipe.yaml")
    write(tmp_path, evaluate=DROP)
    run(tmp_path, "fit", "recipe.yaml", "--overwrite")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert "eval.json" not in left and "validation.json" not in left
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1  # one curve, not two


def test_an_export_in_the_way_is_said_before_training(tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, "quantize", "recipe.yaml")
    run(tmp_path, "export", "recipe.yaml")
    done = server().run(tmp_path, "fit", "recipe.yaml")
    assert done.code == 2 and "run/export/dequantized exists already: use --overwrite" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_run_that_resumes_ends_the_same_way(tmp_path: Path) -> None:
    write(tmp_path)
    table = run(tmp_path, "fit", "recipe.yaml")
    student = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    assert run(tmp_path, "fit", "recipe.yaml", "--resume") == table
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == student


def test_overwriting_may_change_the_recipe(tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, "fit", "recipe.yaml")
    run(tmp_path, "fit", "recipe.yaml", "--overwrite", "--model.plan.scheme", "W2A16_G32")
    plan = json.loads((tmp_path / "run" / "student" / "quant_plan.json").read_text())
    assert list(plan["schemes"]) == ["W2A16_G32"]


def test_a_failed_overwrite_leaves_the_old_run_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    run(tmp_path, "fit", "recipe.yaml")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert server().run(tmp_path, "fit", "recipe.yaml", "--overwrite", "--data.text", "no_such_file.txt").code == 2
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
