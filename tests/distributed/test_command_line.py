"""`kdqat fit` as a user types it, on two processes that Lightning starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import (
    SHARDED,
    SINGLE,
    STRATEGIES,
    Jobs,
    callback,
    curve_difference,
    fsdp2,
    kdqat,
    weight_difference,
    write_recipe,
)

both = pytest.mark.parametrize(("trainer", "parallel"), STRATEGIES.values(), ids=STRATEGIES)


@pytest.mark.parametrize(
    ("trainer", "parallel"),
    [pytest.param(*STRATEGIES["ddp"], marks=pytest.mark.slow), STRATEGIES["fsdp2"]],
    ids=STRATEGIES,
)  # a process of each that Lightning starts costs 15 s; test_same_loss.py has both in every run
def test_fit_trains_saves_the_best_and_evaluates_as_one_process_does(
    trainer: dict[str, Any], parallel: dict[str, bool], single: Jobs, folder: Path
) -> None:
    name = "typed_fsdp2" if parallel else "typed_ddp"
    done = kdqat("fit", write_recipe(folder, name, trainer, parallel=parallel, select="best", evaluate=True))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trained student:") == 1
    ours, theirs = folder / name, folder / "single_best"
    assert curve_difference(ours, theirs) < 1e-5
    assert weight_difference(ours, theirs) < 1e-6
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    assert evaluation(ours) == pytest.approx(evaluation(theirs), rel=1e-4)


def evaluation(run: Path) -> dict[str, float]:
    """eval.json's numbers of the student."""
    return next(iter(json.loads((run / "eval.json").read_text())["models"]["student"].values()))


@pytest.mark.slow
@both
def test_a_run_whose_first_process_was_killed_resumes_to_the_same_end(
    trainer: dict[str, Any], parallel: dict[str, bool], single: Jobs, folder: Path
) -> None:
    name = "killed_fsdp2" if parallel else "killed_ddp"
    kill = callback("KillRankZero", at=7, flag=str(folder / f"{name}.flag"))
    recipe = write_recipe(folder, name, trainer, parallel=parallel, callbacks=(kill,))
    assert kdqat("fit", recipe).returncode == -9
    resumed = kdqat("fit", recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert curve_difference(folder / name, folder / "single_fp32") < 1e-5
    assert weight_difference(folder / name, folder / "single_fp32") < 1e-6


@pytest.mark.slow
def test_fsdp2_takes_one_scale_for_a_layer_and_a_quantized_head_of_its_own(folder: Path) -> None:
    scheme = {"weight": {"format": "int4", "granularity": "tensor"}}  # a scale of shape [1]: nothing for rank 1
    recomputed = {**SHARDED, "checkpoint_blocks": True}
    head: dict[str, Any] = {"model": "untied", "ignore": ()}
    one, two = Jobs(folder, "one"), Jobs(folder, "more")
    one.add("tensor_single", SINGLE, batch_size=4, scheme=scheme)
    two.add("tensor_fsdp2", fsdp2(), parallel=SHARDED, scheme=scheme)
    one.add("head_single", SINGLE, batch_size=4, **head)
    two.add("head_fsdp2", fsdp2(), parallel=recomputed, chunk_tokens=8, **head)
    one.run(1)
    two.run(2)
    for name in ("tensor", "head"):
        assert one.codes(f"{name}_single") == [0] and two.codes(f"{name}_fsdp2") == [0, 0]
        assert curve_difference(folder / f"{name}_fsdp2", folder / f"{name}_single") < 1e-5
        assert weight_difference(folder / f"{name}_fsdp2", folder / f"{name}_single") < 1e-6
