"""Two processes change bits as one does, under DDP and FSDP2, resumed or not; scales lie in shards under FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.student import load_student
from tests.distributed.runs import (
    SINGLE,
    STRATEGIES,
    Jobs,
    checkpoint,
    curve,
    require_same_end,
    require_same_training,
)

pytestmark = pytest.mark.slow  # a minute of two processes each; `pytest -m slow tests/distributed`

SCHEDULE = {"class_path": "BitSchedule", "init_args": {"milestones": {0: 8, 1: 6, 4: None}}}
# the head is quantized too: under FSDP2 it belongs to the root, which keeps what it gathered for a validation
MODEL: dict[str, Any] = {"model": "untied", "ignore": ()}

both = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(scope="module")
def one(folder: Path) -> Jobs:
    jobs = Jobs(folder, "bits_one")
    jobs.add("single_bits", SINGLE, batch_size=4, callbacks=(SCHEDULE,), **MODEL)
    return jobs.run(1)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Jobs:
    jobs = Jobs(folder, "bits_pair")
    for strategy, (trainer, parallel) in STRATEGIES.items():
        jobs.add_stopped(f"{strategy}_bits", trainer, parallel=parallel, callbacks=(SCHEDULE,), **MODEL)
    return jobs.run(2)


@both
def test_two_processes_change_what_one_changes(strategy: str, one: Jobs, pair: Jobs, folder: Path) -> None:
    run = folder / f"{strategy}_bits"
    assert one.codes("single_bits") == [0] and pair.codes(run.name) == [0, 0], pair.logs[0][-3000:]
    assert curve(run, "bits/average") == {0: 8.0, 1: 6.0, 2: 6.0, 3: 6.0, 4: 4.0, 5: 4.0}
    require_same_training(run, folder / "single_bits")


@both
def test_scales_are_fitted_to_each_width_on_every_rank(strategy: str, pair: Jobs, folder: Path) -> None:
    before, after = (checkpoint(folder / f"{strategy}_bits", step)["state_dict"] for step in (4, 6))
    names = [name for name in before if name.endswith("weight_fake_quantizer.scale")]
    assert len(names) == 15 and any("lm_head" in name for name in names)
    for name in names:  # by 31/7, but for what the search clips and what training moved
        ratio = after[name] / before[name]
        assert ratio.min() > 2 and 3 < ratio.mean() < 4.5 and ratio.max() < 5.5, name
        assert before[name.replace("scale", "qmax")] == 31 and after[name.replace("scale", "qmax")] == 7


@both
def test_a_resumed_run_ends_with_the_same_bits(strategy: str, pair: Jobs) -> None:
    require_same_end(pair, f"{strategy}_bits")


@both
def test_the_saved_student_has_the_plans_bits(strategy: str, pair: Jobs, folder: Path) -> None:
    run = folder / f"{strategy}_bits"
    student = load_student(run / "student")
    for name, layer in student.layers.items():
        quantizer = layer.weight_fake_quantizer
        assert quantizer is not None and quantizer.qmax == 7
        trained = checkpoint(run)["state_dict"][f"split.model.{name}.weight_fake_quantizer.scale"]
        assert torch.allclose(quantizer.scale, trained, rtol=1e-3), name  # stored in 16 bits
