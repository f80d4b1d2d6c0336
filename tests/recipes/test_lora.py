"""The recipe of adapters runs on a toy: merged weights in student/, the adapter for peft beside them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.fork_server import ROOT, run


def test_the_recipe_trains_adapters_and_merges_them(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "lora" / "smollm2_w4_lora.yaml")
    run(tmp_path, "fit", recipe, "--model.student.path", "toy:llama", "--trainer.max_steps", "4", "--evaluate", "[]")
    folder = tmp_path / "runs" / "smollm2_w4_lora"
    assert json.loads((folder / "adapters.json").read_text())["merged"] == {"layers": 14, "largest_change": 0.0}
    assert (folder / "adapter" / "adapter_config.json").is_file() and not (folder / "student" / "adapter").exists()
    run(tmp_path, "fit", recipe, "--model.student.path", "toy:llama", "--trainer.max_steps", "4", "--evaluate", "[]",
        "--trainer.callbacks", "[]", "--model.trainable", "scales", "--overwrite")  # fmt: skip
    assert not (folder / "adapters.json").exists() and not (folder / "adapter").exists()
