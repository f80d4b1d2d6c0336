"""Two processes freeze what one freezes, from the start and in a window, under DDP and FSDP2, resumed or not."""

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
    require_same_end,
    require_same_training,
)

FREEZE = {"class_path": "Freeze", "init_args": {"roles": ["o", "v"]}}
WINDOW = {"class_path": "FreezeWindow", "init_args": {"roles": ["o", "v"], "start": 0, "stop": 4}}
KINDS: dict[str, dict[str, Any]] = {"freeze": FREEZE, "window": WINDOW}

each = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(scope="module")
def one(folder: Path) -> Jobs:
    jobs = Jobs(folder, "freezing_one")
    for kind, freezing in KINDS.items():
        jobs.add(f"single_{kind}", SINGLE, batch_size=4, callbacks=(freezing,))
    return jobs.run(1)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Jobs:
    jobs = Jobs(folder, "freezing_pair")
    for strategy, (trainer, parallel) in STRATEGIES.items():
        for kind, freezing in KINDS.items():
            jobs.add_stopped(f"{strategy}_{kind}", trainer, parallel=parallel, callbacks=(freezing,))
    return jobs.run(2)


@each
@both
def test_two_processes_train_what_one_trains(strategy: str, kind: str, one: Jobs, pair: Jobs, folder: Path) -> None:
    assert one.codes(f"single_{kind}") == [0] and pair.codes(f"{strategy}_{kind}") == [0, 0]
    require_same_training(folder / f"{strategy}_{kind}", folder / f"single_{kind}")


@both
def test_what_is_frozen_never_moves_and_what_waits_moves_after_its_window(
    strategy: str, pair: Jobs, folder: Path
) -> None:
    for kind, steps in (("freeze", (2, 4, 6)), ("window", (2, 4))):
        run = folder / f"{strategy}_{kind}"
        first, *later = (checkpoint(run, step)["state_dict"] for step in steps)
        names = [name for name in first if "o_proj.weight" in name or "v_proj.weight" in name]
        assert len(names) > 8
        assert all(torch.equal(first[name], state[name]) for state in later for name in names)
        others = [name for name in first if name.endswith("q_proj.weight")]
        assert not any(torch.equal(first[name], state[name]) for state in later for name in others)
    after = checkpoint(run, 6)["state_dict"]
    assert not any(torch.equal(first[name], after[name]) for name in names if name.endswith("proj.weight"))


@each
@both
def test_a_resumed_run_ends_with_the_same_bits(strategy: str, kind: str, pair: Jobs) -> None:
    require_same_end(pair, f"{strategy}_{kind}")


@both
def test_the_saved_student_holds_the_frozen_values(strategy: str, pair: Jobs, folder: Path) -> None:
    student = load_student(folder / f"{strategy}_freeze" / "student")
    for name, layer in student.layers.items():
        with torch.no_grad():
            on_grid = torch.equal(layer.fake_quantized_weight(), layer.weight)
        assert on_grid == name.endswith(("o_proj", "v_proj")), name
