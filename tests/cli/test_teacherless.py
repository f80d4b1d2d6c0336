"""A recipe without a teacher trains without one, and its evaluators still have somebody to measure against."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.fork_server import run, server
from tests.cli.recipes import named_loss, write


def test_cross_entropy_without_a_teacher_is_measured_against_the_source(tmp_path: Path) -> None:
    write(tmp_path, model__teacher=None, model__loss=named_loss("CrossEntropy"))
    run(tmp_path, "fit", "recipe.yaml")
    assert "train/kl" not in (tmp_path / "run" / "metrics.csv").read_text()
    numbers = json.loads((tmp_path / "run" / "eval.json").read_text())["models"]["student"]["kdqat:prose"]
    assert numbers["kl_mean"] >= 0 and numbers["teacher_perplexity"] > 1


def test_a_divergence_without_a_teacher_is_refused(tmp_path: Path) -> None:
    write(tmp_path, model__teacher=None)
    done = server().run(tmp_path, "fit", "recipe.yaml")
    assert done.code == 2 and "teacher" in done.err


def test_validation_every_so_many_batches_survives_in_the_run_directory(tmp_path: Path) -> None:
    write(tmp_path, trainer__check_val_every_n_epoch=None, trainer__val_check_interval=1)
    run(tmp_path, "fit", "recipe.yaml")
    assert "val/kl" in (tmp_path / "run" / "metrics.csv").read_text()
    run(tmp_path, "export", "run", "--overwrite")
