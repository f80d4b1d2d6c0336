"""The recipe of a bit schedule: scored and trained on a toy, and every schedule that its comments list is one."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import yaml

from kdqat.callbacks import BitSchedule
from kdqat.cli.parser import parse_recipe
from kdqat.student import load_student
from tests.cli.fork_server import ROOT, run

RECIPE = ROOT / "recipes" / "layerwise" / "smollm2_8_to_4_schedule.yaml"


def test_it_is_short_and_reads_the_scores_it_writes() -> None:
    text = RECIPE.read_text()
    assert len(text.splitlines()) <= 40
    recipe = parse_recipe(RECIPE)
    (schedule,) = recipe.trainer["callbacks"]
    assert isinstance(schedule, BitSchedule) and recipe.scoring is not None
    assert schedule.scores == str(recipe.run.path / "scores.json") and schedule.stop < recipe.trainer["max_steps"]


def test_what_its_comments_list_are_schedules_too(tmp_path: Path) -> None:
    listed = re.findall(r"#   init_args: (.*)", RECIPE.read_text())
    assert len(listed) == 2
    for arguments in listed:
        content = yaml.safe_load(RECIPE.read_text())
        content["trainer"]["callbacks"][0]["init_args"] = yaml.safe_load(arguments)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        (schedule,) = parse_recipe(tmp_path / "recipe.yaml").trainer["callbacks"]
        assert isinstance(schedule, BitSchedule)
    assert schedule.progressive == [8, 6, 5, 4] and schedule.shape == "cosine"
    assert not parse_recipe(RECIPE, ["--trainer.callbacks", "null"]).trainer.get("callbacks")


def test_a_toy_is_scored_and_comes_down_to_its_plan(tmp_path: Path) -> None:
    content = yaml.safe_load(RECIPE.read_text())
    content["model"]["student"] = {"path": "toy:llama"}
    content["score"]["calibration"] = {"text": "kdqat:prose", "seq_len": 32, "num_rows": 2}
    content["data"] = {
        "class_path": "PackedText",
        "init_args": {"text": "kdqat:prose", "seq_len": 32, "batch_size": 2, "val_rows": 2},
    }
    content["model"]["scheduler"]["init_args"]["warmup_steps"] = 1
    content["trainer"] |= {"max_steps": 5, "accelerator": "cpu", "default_root_dir": "run"}
    content["trainer"]["callbacks"][0]["init_args"] |= {"scores": "run/scores.json", "start": 1, "stop": 3}
    del content["evaluate"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    run(tmp_path, "score", "recipe.yaml")
    run(tmp_path, "fit", "recipe.yaml")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert [float(row["bits/average"]) for row in csv.DictReader(file)] == [8, 6, 6, 4, 4]
    layers = load_student(tmp_path / "run" / "student").layers.values()
    assert all(layer.weight_fake_quantizer.qmax == 7 for layer in layers)
