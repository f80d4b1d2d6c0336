"""Two processes stop, break and resume together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import STEPS, Jobs, curve_difference, weight_difference

both = pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])


@both
def test_a_sigterm_to_one_rank_saves_and_stops_both(strategy: str, two: Jobs) -> None:
    # the first process speaks for the run; Lightning's launcher kills it if another one fails before it
    assert two.codes(f"{strategy}_stopped") == [143, 0]


@both
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(strategy: str, two: Jobs, folder: Path) -> None:
    assert two.codes(f"{strategy}_stopped, resumed") == [0, 0]
    stopped, whole = folder / f"{strategy}_stopped", folder / f"{strategy}_fp32"
    assert (stopped / "checkpoints" / "step=00000003.ckpt").is_file()  # where the signal met it
    for column in ("train/kl", "train/grad_norm", "val/kl"):
        assert curve_difference(stopped, whole, column) == 0, column
    assert weight_difference(stopped, whole) == 0
    assert (stopped / "student" / "model.safetensors").read_bytes() == (
        whole / "student" / "model.safetensors"
    ).read_bytes()


@both
def test_a_loss_that_is_no_number_on_one_rank_ends_both(strategy: str, two: Jobs, folder: Path) -> None:
    assert two.codes(f"{strategy}_broken") == [2, 2]
    assert "step 2: the loss of another process is nan" in two.logs[0]
    assert two.logs[1].count("step 2: the loss is nan; first at layer model.layers.1.mlp.down_proj") == 2
    saved = [path.name for path in (folder / f"{strategy}_broken" / "checkpoints").iterdir()]
    assert "step=00000002.ckpt" in saved and f"step={STEPS:08d}.ckpt" not in saved


def test_after_training_a_signal_ends_the_process_again(two: Jobs) -> None:
    assert all(result["sigterm_restored"] for results in two.results for result in results.values())


def test_checkpoints_that_are_folders_are_refused(two: Jobs, folder: Path) -> None:
    assert two.codes("folder_checkpoint") == [2, 2]
    assert "set save_distributed_checkpoint: false" in two.logs[0]


@pytest.mark.parametrize("name", ["shard_without_strategy", "strategy_without_shard"])
def test_sharding_without_its_strategy_is_refused_and_the_other_way_round(name: str, two: Jobs) -> None:
    assert two.codes(name) == [2, 2]
    assert "set both or none" in two.logs[0]


def test_no_checkpoint_leaves_a_part_behind(two: Jobs, folder: Path) -> None:
    assert not list(folder.glob("*/checkpoints/.*"))
