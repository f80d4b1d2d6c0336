"""The recipe of adapters runs on a toy: merged weights in student/, the adapter for peft beside them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.fork_server import ROOT, run

RECIPE = str(ROOT / "recipes" / "lora" / "smollm2_w4_lora.yaml")
TOY = ["--model.student.path", "toy:llama", "--trainer.max_steps", "4", "--evaluate", "[]"]


def test_the_recipe_trains_adapters_and_merges_them(tmp_path: Path) -> None:
    run(tmp_path, "fit", RECIPE, *TOY)
    folder = tmp_path / "runs" / "smollm2_w4_lora"
    assert json.loads((folder / "adapters.json").read_text())["merged"] == {"layers": 14, "largest_change": 0.0}
    assert (folder / "adapter" / "adapter_config.json").is_file() and not (folder / "student" / "adapter").exists()
    run(tmp_path, "fit", RECIPE, *TOY, "--trainer.callbacks", "[]", "--model.trainable", "scales", "--overwrite")
    assert not (folder / "adapters.json").exists() and not (folder / "adapter").exists()


def test_merged_weights_are_judged_by_the_source_and_not_by_themselves(tmp_path: Path) -> None:
    text = "[{class_path: TeacherAgreement, init_args: {text: 'kdqat:prose', seq_len: 32, limit: 4}}]"
    found = []
    for name, teacher in (("shared", "SharedTeacher"), ("frozen", "FrozenTeacher")):
        further = ["--model.teacher", teacher, "--trainer.default_root_dir", name, "--trainer.precision", "32-true"]
        further += ["--model.teacher.dtype", "float32"] if teacher == "FrozenTeacher" else []
        further += ["--model.optimizer.lr", "0.01"]
        run(tmp_path, "fit", RECIPE, *TOY[:4], "--evaluate", text, *further)
        run(tmp_path, "validate", RECIPE, *TOY[:4], "--evaluate", text, *further)
        folder = tmp_path / name
        numbers = json.loads((folder / "validation.json").read_text())
        found.append((json.loads((folder / "eval.json").read_text())["models"], numbers["val/kl"]))
    assert found[0] == found[1] and found[0][1] > 0
