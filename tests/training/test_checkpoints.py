"""When checkpoints are written, which are kept, what is in them, and what becomes the student."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.training import Checkpoints, newest_complete
from kdqat.training.gather import gather_student
from tests.training.toy import batch, make_module, train

BATCHES = [batch(1, seed=n) for n in range(7)]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("*"))


def steps(*numbers: int) -> list[str]:
    return [f"step={n:08d}.ckpt" for n in numbers]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [({}, (7,)), ({"every_n_steps": 2}, (7,)), ({"every_n_steps": 2, "keep_last": 3}, (4, 6, 7)),
     ({"every_n_steps": 7, "keep_last": 9}, (7,)), ({"every_n_steps": 3, "keep_last": 9}, (3, 6, 7))],
    ids=str,
)  # fmt: skip
def test_checkpoints_are_written_at_intervals_and_at_the_end_and_the_last_are_kept(
    arguments: dict[str, int], kept: tuple[int, ...], tmp_path: Path
) -> None:
    train(make_module(), BATCHES, run=tmp_path, callbacks=[Checkpoints(**arguments)])
    assert names(tmp_path) == steps(*kept)


def test_steps_are_optimizer_steps_not_micro_batches(tmp_path: Path) -> None:
    keep_all = Checkpoints(every_n_steps=1, keep_last=9)
    train(make_module(), BATCHES[:6], run=tmp_path, callbacks=[keep_all], accumulate_grad_batches=3)
    assert names(tmp_path) == steps(1, 2)


def test_a_checkpoint_has_everything_but_the_teacher_and_runs_no_code(tmp_path: Path) -> None:
    module = make_module()
    trainer = train(module, BATCHES, run=tmp_path)
    content = torch.load(newest_complete(tmp_path / "checkpoints"), weights_only=True)
    assert module.split is not None
    student = module.split.state_dict()
    assert set(content["state_dict"]) == {f"split.{name}" for name in student}
    assert all(torch.equal(content["state_dict"][f"split.{n}"], value) for n, value in student.items())
    assert len(content["optimizer_states"][0]["state"]) == len(list(module.parameters()))
    assert content["global_step"] == 7 and "loops" in content
    rng = content["callbacks"]["Checkpoints"]["rng"]
    assert set(rng) == {"python", "numpy", "torch", "cuda"}
    tensors = sum(p.numel() for p in module.parameters())
    assert newest_complete(tmp_path / "checkpoints").stat().st_size < 3.5 * 4 * tensors  # weights and two moments
    assert trainer.global_step == 7


def diverging(run: Path, **arguments: Any) -> tuple[Any, Any]:
    """A run whose validation gets worse: a random toy is its own best student."""
    module = make_module(optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = train(module, BATCHES, run=run, val=[batch(2, seed=99)], val_check_interval=1,
                    callbacks=[Checkpoints(**arguments)])  # fmt: skip
    return trainer, module


def test_the_best_validation_is_kept_and_becomes_the_student_on_demand(tmp_path: Path) -> None:
    trainer, module = diverging(tmp_path, select="best")
    (callback,) = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert names(tmp_path) == ["best.ckpt", *steps(7)]
    assert best["global_step"] == callback.best_step < 7 and "optimizer_states" not in best
    assert callback.best_kl < float(trainer.callback_metrics["val/kl"])
    last = {name: value.clone() for name, value in module.split.state_dict().items()}
    student = gather_student(trainer, module)
    state = student.split.state_dict()
    assert all(torch.equal(value, best["state_dict"][f"split.{name}"]) for name, value in state.items())
    assert any(not torch.equal(value, last[name]) for name, value in state.items())
    assert not student.split.training


def test_the_last_weights_are_the_student_by_default(tmp_path: Path) -> None:
    trainer, module = diverging(tmp_path)
    last = {name: value.clone() for name, value in module.split.state_dict().items()}
    state = gather_student(trainer, module).split.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in state.items())


def test_a_full_disk_says_so_leaves_the_earlier_file_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def fails(content: Any, path: Path) -> None:
        calls.append(path)
        save(content, path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(ValueError, match=r"step=00000004.ckpt: .*No space left on device.*make room.*--resume"):
        train(make_module(), BATCHES, run=tmp_path, callbacks=[Checkpoints(every_n_steps=2)])
    assert names(tmp_path) == steps(2)
    assert torch.load(newest_complete(tmp_path / "checkpoints"), weights_only=True)["global_step"] == 2


def test_damaged_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = (tmp_path / name for name in steps(2, 4))
    for path in (older, newer):
        torch.save({"weights": torch.ones(1000)}, path)
    assert newest_complete(tmp_path) == newer
    newer.write_bytes(newer.read_bytes()[:-100])
    assert newest_complete(tmp_path) == older
    assert f"{newer} is incomplete; resuming from {older.name}" in caplog.text
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="no older one; start again with --overwrite"):
        newest_complete(tmp_path)


def test_without_a_checkpoint_resuming_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        newest_complete(tmp_path)


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"keep_last": 0}, {"select": "first"}], ids=str)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Checkpoints: "):
        Checkpoints(**wrong)
