"""Every kind of plan goes through every verb: activations, caches, block floats, embeddings, experts, searched floats.

Each toy is prepared and trained, trained alone, evaluated, exported, read by plain transformers, and asked to generate.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.case import named, plan
from tests.cli.fork_server import run, server
from tests.cli.recipes import DROP, write
from tests.training.test_kill_resume import moment

TEXT = {"text": "kdqat:prose", "seq_len": 32, "num_rows": 8, "max_tokens": 128}
FPQ = named("FPQ", num_candidates=3, num_rounds=1, max_tokens=64)

FORMATS: dict[str, dict[str, Any]] = {
    "static activations": {"model__plan": plan(scheme="W8A8_STATIC"), "model__calibration": TEXT},
    "4-bit activations and cache at deployment": {
        "model__plan": plan(scheme="W4A4", kv_cache="KV8", deploy_only=["activation", "kv_cache"])
    },
    "NVFP4": {"model__plan": plan(scheme="NVFP4"), "model__calibration": TEXT},
    "tied embeddings": {"model__plan": plan(ignore=[], embeddings="W4A16_G32")},
    "experts": {"model__student__path": "toy:qwen3_moe"},
    "FPQ": {
        "model__plan": plan(scheme="FP4_W4A4_PRE_SHIFT"),
        "model__quantizer": named("Fixed"),
        "model__initializer": FPQ,
        "model__calibration": TEXT,
    },
}
STATIC = FORMATS["static activations"]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda name: name.replace(" ", "-"))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where quantize and fit left run/."""
    folder = tmp_path_factory.mktemp("format")
    write(folder, **FORMATS[request.param])
    run(folder, "quantize", "recipe.yaml")
    run(folder, "fit", "recipe.yaml")
    write(folder, name="alone.yaml", trainer__default_root_dir="alone", **FORMATS[request.param])
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """What a saved student holds: latent weights, and scales as stored."""
    return load_file(folder / "model.safetensors") | load_file(folder / "quantizers.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_quantize_before_fit_changes_no_bit_and_training_changes_some(finished: Path) -> None:
    run(finished, "fit", "alone.yaml")
    after = stored(finished / "run" / "student")
    assert same(after, stored(finished / "alone" / "student"))
    assert not same(after, stored(finished / "run" / "prepared"))


def test_eval_and_export_say_again_what_fit_said(finished: Path) -> None:
    before = (finished / "run" / "eval.json").read_text()
    (weights,) = (finished / "run" / "export").rglob("*.safetensors")
    exported = load_file(weights)
    run(finished, "eval", "run", "--overwrite")
    run(finished, "export", "run", "--overwrite")
    assert (finished / "run" / "eval.json").read_text() == before
    assert same(load_file(weights), exported)
    facts = json.loads(before)
    for numbers in (facts["models"]["rtn"]["kdqat:prose"], facts["models"]["student"]["kdqat:prose"]):
        assert 0 < numbers["kl_mean"] < 1
        assert numbers["perplexity"] == pytest.approx(numbers["teacher_perplexity"], rel=0.5)
    assert facts["bytes"]["student"] < 0.75 * facts["bytes"]["teacher"]


def test_the_export_holds_fake_quantized_weights_that_plain_transformers_reads(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    from kdqat.student import load_student

    model = AutoModelForCausalLM.from_pretrained(finished / "run" / "export" / "dequantized")
    student = load_student(finished / "run" / "student")
    state = model.state_dict()
    for name, layer in student.layers.items():
        key = name if name in state else f"{name}.weight"
        assert torch.equal(state[key], layer.fake_quantized_weight().detach()), name
        assert not torch.equal(state[key], layer.weight), name


def test_it_generates(finished: Path) -> None:
    assert run(finished, "generate", "run", "Hello", "--max_new_tokens", "4").startswith("Hello")


def test_a_killed_run_with_learned_activation_ranges_resumes_to_the_same_bits(tmp_path: Path) -> None:
    checkpoints = named("Checkpoints", every_n_steps=2)
    trainer = {"accelerator": "cpu", "max_steps": 8, "log_every_n_steps": 1, "callbacks": [checkpoints]}
    for name in ("killed", "whole"):
        own = {"trainer": {**trainer, "default_root_dir": name}}
        write(tmp_path, name=f"{name}.yaml", evaluate=DROP, export=DROP, **own, **STATIC)
    run(tmp_path, "fit", "whole.yaml")
    command = server().start(tmp_path, "fit", "killed.yaml", before="tests.cli.sabotage:slow_steps")
    assert moment("between", command, random.Random(0), "killed")
    command.kill()
    assert command.wait().code == -9
    assert not (tmp_path / "killed" / "student").exists()
    run(tmp_path, "fit", "killed.yaml", "--resume")
    whole = stored(tmp_path / "whole" / "student")
    assert same(stored(tmp_path / "killed" / "student"), whole)
    assert any(key.endswith("activation.scale") for key in whole)
