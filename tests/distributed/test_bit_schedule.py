"""Two processes change bits as one does, under DDP and FSDP2, resumed or not; scales lie in shards under FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.student import load_student
from tests.distributed.runs import (
    DDP,
    SHARDED,
    SINGLE,
    Jobs,
    callback,
    checkpoint,
    curve,
    curve_difference,
    fsdp2,
    weight_difference,
    write_inputs,
)

pytestmark = pytest.mark.slow  # a minute of two processes each; `pytest -m slow tests/distributed`

SCHEDULE = {"class_path": "BitSchedule", "init_args": {"milestones": {0: 8, 1: 6, 4: None}}}
# the head is quantized too: under FSDP2 it belongs to the root, which keeps what it gathered for a validation
MODEL: dict[str, Any] = {"model": "untied", "ignore": ()}
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-6

both = pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bits")
    write_inputs(path)
    return path


@pytest.fixture(scope="module")
def one(place: Path) -> Jobs:
    jobs = Jobs(place, "one")
    jobs.add("single", SINGLE, batch_size=4, callbacks=(SCHEDULE,), **MODEL)
    return jobs.run(1)


@pytest.fixture(scope="module")
def pair(place: Path) -> Jobs:
    jobs = Jobs(place, "pair")
    for strategy, trainer, parallel in (("ddp", DDP, {}), ("fsdp2", fsdp2(), SHARDED)):
        jobs.add(strategy, trainer, parallel=parallel, callbacks=(SCHEDULE,), **MODEL)
        stop = callback("StopRankZero", at=4)
        jobs.add(f"{strategy}_stopped", trainer, parallel=parallel, callbacks=(SCHEDULE, stop), **MODEL)
        jobs.resume(f"{strategy}_stopped")
    return jobs.run(2)


@both
def test_two_processes_change_what_one_changes(strategy: str, one: Jobs, pair: Jobs, place: Path) -> None:
    assert one.codes("single") == [0] and pair.codes(strategy) == [0, 0], pair.logs[0][-3000:]
    assert curve(place / strategy, "bits/average") == {0: 8.0, 1: 6.0, 2: 6.0, 3: 6.0, 4: 4.0, 5: 4.0}
    for column in ("train/kl", "train/grad_norm"):
        assert curve_difference(place / strategy, place / "single", column) < LOSS_TOLERANCE, column
    assert weight_difference(place / strategy, place / "single") < WEIGHT_TOLERANCE


@both
def test_scales_are_fitted_to_each_width_on_every_rank(strategy: str, pair: Jobs, place: Path) -> None:
    before, after = (checkpoint(place / strategy, step)["state_dict"] for step in (4, 6))
    names = [name for name in before if name.endswith("weight_fake_quantizer.scale")]
    assert len(names) == 15 and any("lm_head" in name for name in names)
    for name in names:  # by 31/7, but for what the search clips and what training moved
        ratio = after[name] / before[name]
        assert ratio.min() > 2 and 3 < ratio.mean() < 4.5 and ratio.max() < 5.5, name
        assert before[name.replace("scale", "qmax")] == 31 and after[name.replace("scale", "qmax")] == 7


@both
def test_a_resumed_run_ends_with_the_same_bits(strategy: str, pair: Jobs, place: Path) -> None:
    name = f"{strategy}_stopped"
    assert pair.codes(name) == [143, 0] and pair.codes(f"{name}, resumed") == [0, 0], pair.logs[0][-3000:]
    assert curve(place / name, "train/kl") == curve(place / strategy, "train/kl")
    assert weight_difference(place / name, place / strategy) == 0


@both
def test_the_saved_student_has_the_plans_bits(strategy: str, pair: Jobs, place: Path) -> None:
    student = load_student(place / strategy / "student")
    for name, layer in student.layers.items():
        quantizer = layer.weight_fake_quantizer
        assert quantizer is not None and quantizer.qmax == 7
        trained = checkpoint(place / strategy)["state_dict"][f"split.model.{name}.weight_fake_quantizer.scale"]
        assert torch.allclose(quantizer.scale, trained, rtol=1e-3), name  # stored in 16 bits
