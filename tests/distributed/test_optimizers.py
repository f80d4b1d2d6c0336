"""Two processes with the fused AdamW and with bf16 weights: a stopped and resumed run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed.runs import DDP, SHARDED, Jobs, callback, checkpoint, fsdp2, weight_difference, write_inputs

ROUNDED = {"class_path": "AdamWSR", "init_args": {"lr": 1.0e-3}}
FUSED = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}}
RUNS = {  # optimizer, dtype of the student, what else
    "fused": (FUSED, "float32", fsdp2(), {"parallel": SHARDED}),
    "sharded_bf16": (ROUNDED, "bfloat16", fsdp2(), {"parallel": SHARDED, "quantizer": "MinMax"}),
    "ddp_bf16": (ROUNDED, "bfloat16", DDP, {}),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("optimizers")
    write_inputs(folder)
    jobs = Jobs(folder, "optimizers")
    for name, (optimizer, dtype, trainer, further) in RUNS.items():
        for run, callbacks in ((name, ()), (f"{name}_stopped", (callback("StopRankZero", at=4),))):
            jobs.add(run, trainer, callbacks=callbacks, **further)
            recipe = yaml.safe_load((folder / f"{run}.yaml").read_text())
            recipe["model"]["optimizer"], recipe["model"]["student"]["dtype"] = optimizer, dtype
            (folder / f"{run}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        jobs.resume(f"{name}_stopped")
    return jobs.run(2)


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(jobs: Jobs, name: str) -> None:
    run, stopped = jobs.folder / name, jobs.folder / f"{name}_stopped"
    assert jobs.codes(name) == [0, 0], jobs.logs[0][-2000:]
    assert jobs.codes(f"{name}_stopped") == [143, 0] and jobs.codes(f"{name}_stopped, resumed") == [0, 0]
    assert weight_difference(run, stopped) == 0 and weight_moved(run) > 0


@pytest.mark.parametrize(("name", "dtype"), [("fused", torch.float32), ("ddp_bf16", torch.bfloat16)])
def test_weights_have_the_dtype_of_the_recipe_and_scales_are_float32(jobs: Jobs, name: str, dtype: torch.dtype) -> None:
    state = checkpoint(jobs.folder / name)["state_dict"]
    assert {value.dtype for key, value in state.items() if key.endswith("_proj.weight")} == {dtype}
    assert {value.dtype for key, value in state.items() if key.endswith("quantizer.scale")} == {torch.float32}


def weight_moved(run: Path) -> float:
    first, last = checkpoint(run, 2)["state_dict"], checkpoint(run)["state_dict"]
    return max(float((first[key].float() - last[key].float()).abs().max()) for key in first)
