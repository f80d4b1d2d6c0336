"""Two processes with the fused AdamW and with bf16 weights: a stopped and resumed run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed.runs import DDP, SHARDED, Jobs, checkpoint, fsdp2, require_same_end

pytestmark = pytest.mark.slow  # `pytest -m slow tests/distributed`

ROUNDED = {"class_path": "AdamWSR", "init_args": {"lr": 1.0e-3}}
FUSED = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}}
RUNS = {  # optimizer, dtype of the student, what else
    "fused": (FUSED, "float32", fsdp2(), {"parallel": SHARDED}),
    "rounded_fsdp2": (ROUNDED, "bfloat16", fsdp2(), {"parallel": SHARDED, "quantizer": "MinMax"}),
    "rounded_ddp": (ROUNDED, "bfloat16", DDP, {}),
}


@pytest.fixture(scope="module")
def jobs(folder: Path) -> Jobs:
    jobs = Jobs(folder, "optimizers")
    for name, (optimizer, dtype, trainer, further) in RUNS.items():
        jobs.add_stopped(name, trainer, **further)
        for run in (name, f"{name}_stopped"):
            recipe = yaml.safe_load((folder / f"{run}.yaml").read_text())
            recipe["model"]["optimizer"], recipe["model"]["student"]["dtype"] = optimizer, dtype
            (folder / f"{run}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return jobs.run(2)


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(jobs: Jobs, name: str) -> None:
    require_same_end(jobs, name)
    assert weight_moved(jobs.folder / name) > 0


@pytest.mark.parametrize(("name", "dtype"), [("fused", torch.float32), ("rounded_ddp", torch.bfloat16)])
def test_weights_have_the_dtype_of_the_recipe_and_scales_are_float32(jobs: Jobs, name: str, dtype: torch.dtype) -> None:
    state = checkpoint(jobs.folder / name)["state_dict"]
    assert {value.dtype for key, value in state.items() if key.endswith("_proj.weight")} == {dtype}
    assert {value.dtype for key, value in state.items() if key.endswith("quantizer.scale")} == {torch.float32}


def weight_moved(run: Path) -> float:
    first, last = checkpoint(run, 2)["state_dict"], checkpoint(run)["state_dict"]
    return max(float((first[key].float() - last[key].float()).abs().max()) for key in first)
