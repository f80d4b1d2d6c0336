"""Two processes that train adapters: the losses of one process, and a stopped run ends with the bits of a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.runs import (
    DDP,
    SHARDED,
    SINGLE,
    Jobs,
    curve_difference,
    fsdp2,
    require_same_end,
    weight_difference,
)

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ddp_inside": (DDP, {}, "inside"),
    "ddp_outside": (DDP, {}, "outside"),
    "fsdp2_inside": (fsdp2(), {"parallel": {**SHARDED, "checkpoint_blocks": True}}, "inside"),
    "fsdp2_outside": (fsdp2(), {"parallel": SHARDED}, "outside"),
}
STOPPED = "fsdp2_inside"  # once more, with a signal on the way


def adapters(placement: str) -> dict[str, Any]:
    return {"class_path": "LoraAdapters", "init_args": {"placement": placement, "rank": 4}}


@pytest.fixture(scope="module")
def one(folder: Path) -> Jobs:
    jobs = Jobs(folder, "adapters_one")
    for placement in ("inside", "outside"):
        jobs.add(f"single_{placement}", SINGLE, batch_size=4, callbacks=(adapters(placement),))
    return jobs.run(1)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Jobs:
    jobs = Jobs(folder, "adapters_pair")
    for name, (trainer, further, placement) in RUNS.items():
        add = jobs.add_stopped if name == STOPPED else jobs.add
        add(name, trainer, callbacks=(adapters(placement),), **further)
    jobs.add("fsdp2_shared", fsdp2(), parallel=SHARDED, callbacks=(adapters("inside"),))
    path = folder / "fsdp2_shared.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["teacher"] = {"class_path": "SharedTeacher"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return jobs.run(2)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_one(one: Jobs, pair: Jobs, name: str) -> None:
    assert pair.codes(name) == [0, 0], pair.logs[0][-3000:]
    placement = RUNS[name][2]
    run, other = pair.folder / name, one.folder / f"single_{placement}"
    assert curve_difference(run, other) < 1e-4 and weight_difference(run, other) < 1e-5
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys() and not any("adapter" in key for key in ours)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_process_alone_writes_what_became_of_the_adapters(pair: Jobs, name: str) -> None:
    inside, run = RUNS[name][2] == "inside", pair.folder / name
    found = json.loads((run / "adapters.json").read_text())
    assert found["merged"]["layers"] == (14 if inside else 0) and bool(found["outside"]) != inside
    assert (run / "adapter").is_dir() == inside and (run / "student" / "adapter").is_dir() != inside
    assert not any("adapter" in path for path in pair.results[1][name]["written"])


def test_a_stopped_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(pair: Jobs) -> None:
    require_same_end(pair, STOPPED)


def test_a_shared_teacher_is_legal_under_fsdp2(one: Jobs, pair: Jobs) -> None:
    assert pair.codes("fsdp2_shared") == [0, 0], pair.logs[0][-3000:]
    assert curve_difference(pair.folder / "fsdp2_shared", one.folder / "single_inside") < 1e-4
