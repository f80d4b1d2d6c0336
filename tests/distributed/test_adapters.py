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
    callback,
    curve_difference,
    fsdp2,
    weight_difference,
    write_inputs,
)

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ddp_inside": (DDP, {}, "inside"),
    "ddp_outside": (DDP, {}, "outside"),
    "fsdp2_inside": (fsdp2(), {"parallel": {**SHARDED, "checkpoint_blocks": True}}, "inside"),
    "fsdp2_outside": (fsdp2(), {"parallel": SHARDED}, "outside"),
}


def adapters(placement: str) -> dict[str, Any]:
    return {"class_path": "LoraAdapters", "init_args": {"placement": placement, "rank": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def single(folder: Path) -> Jobs:
    jobs = Jobs(folder, "single")
    for placement in ("inside", "outside"):
        jobs.add(f"single_{placement}", SINGLE, batch_size=4, callbacks=(adapters(placement),))
    return jobs.run(1)


@pytest.fixture(scope="module")
def two(folder: Path) -> Jobs:
    jobs = Jobs(folder, "two")
    for name, (trainer, further, placement) in RUNS.items():
        jobs.add(name, trainer, callbacks=(adapters(placement),), **further)
    stops = (adapters("inside"), callback("StopRankZero", at=4))
    jobs.add("fsdp2_stopped", fsdp2(), callbacks=stops, **RUNS["fsdp2_inside"][1])
    jobs.resume("fsdp2_stopped")
    jobs.add("fsdp2_shared", fsdp2(), parallel=SHARDED, callbacks=(adapters("inside"),))
    path = folder / "fsdp2_shared.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["teacher"] = {"class_path": "SharedTeacher"}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return jobs.run(2)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_follow_one(single: Jobs, two: Jobs, name: str) -> None:
    assert two.codes(name) == [0, 0], two.logs[0][-3000:]
    placement = RUNS[name][2]
    run, other = two.folder / name, single.folder / f"single_{placement}"
    assert curve_difference(run, other) < 1e-4 and weight_difference(run, other) < 1e-5
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys() and not any("adapter" in key for key in ours)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_process_alone_writes_what_became_of_the_adapters(two: Jobs, name: str) -> None:
    inside, run = RUNS[name][2] == "inside", two.folder / name
    found = json.loads((run / "adapters.json").read_text())
    assert found["merged"]["layers"] == (14 if inside else 0) and bool(found["outside"]) != inside
    assert (run / "adapter").is_dir() == inside and (run / "student" / "adapter").is_dir() != inside
    assert not any("adapter" in path for path in two.results[1][name]["written"])


def test_a_stopped_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(two: Jobs) -> None:
    assert two.codes("fsdp2_stopped") == [143, 0] and two.codes("fsdp2_stopped, resumed") == [0, 0]
    assert weight_difference(two.folder / "fsdp2_inside", two.folder / "fsdp2_stopped") == 0


def test_a_shared_teacher_is_legal_under_fsdp2(single: Jobs, two: Jobs) -> None:
    assert two.codes("fsdp2_shared") == [0, 0], two.logs[0][-3000:]
    assert curve_difference(two.folder / "fsdp2_shared", single.folder / "single_inside") < 1e-4
