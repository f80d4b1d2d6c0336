"""The recipe of cached answers runs on a toy: `kdqat fit --dry_run`, `kdqat cache`, then `kdqat fit`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.fork_server import ROOT, server


def test_the_recipe_fills_its_cache_and_trains_from_it(tmp_path: Path) -> None:
    overrides = ["--model.student.path", "toy:llama", "--trainer.max_steps", "4", "--data.limit", "4"]
    for verb, *options in (("fit", "--dry_run"), ("cache",), ("fit",)):
        recipe = str(ROOT / "recipes" / "cached_teacher.yaml")
        done = server().run(tmp_path, verb, recipe, *options, *overrides, KDQAT_CACHE=str(tmp_path / "cache"))
        assert done.code == 0, done.err
        if options:
            assert "4 steps" in done.out and not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()
    evaluation = json.loads((tmp_path / "runs" / "cached_teacher" / "eval.json").read_text())
    assert set(evaluation["models"]) == {"rtn", "student"}
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1
