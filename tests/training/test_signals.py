"""The recorder: what it buffers, writes, drops on a resume and gives to the loggers; signals without training."""

from __future__ import annotations

import csv
import gc
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import kdqat
from kdqat.callbacks import GradientLog, OscillationLog, SignalLog
from kdqat.models import CachedTeacher
from kdqat.report.recommend import RATIO, recommend, role_table
from kdqat.training import Observer
from kdqat.training.signals import SCHEMA, SignalRecorder, recorder_of
from kdqat.types import LayerRef
from tests.training.toy import batch, make_module, train

O0, O1, Q0 = (LayerRef(name, block, role, ()) for name, block, role in (("a", 0, "o"), ("b", 1, "o"), ("c", 0, "q")))
BLOCK = LayerRef("layers.0", 0, "block", ())


class Logger:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.rows.append((step, numbers))


def fake_trainer(step: int = 0, **changes: Any) -> Any:
    return SimpleNamespace(**{"global_step": step, "is_global_zero": True, "loggers": [Logger()], **changes})


def test_a_value_becomes_a_row_of_the_contract() -> None:
    recorder = SignalRecorder()
    recorder.add(20, "signal", "gain", [O0, LayerRef("", None, "", ())], torch.tensor([0.5, 2.0]))
    assert recorder.table().schema == SCHEMA
    assert recorder.table().to_pylist() == [
        {"step": 20, "source": "signal", "metric": "gain", "block": 0, "role": "o", "layer": "a", "value": 0.5},
        {"step": 20, "source": "signal", "metric": "gain", "block": -1, "role": "", "layer": "", "value": 2.0},
    ]


def test_a_value_whose_place_nobody_asked_for_is_no_row() -> None:
    recorder = SignalRecorder()
    recorder.add(3, "signal", "gain", [None, O0, None], torch.tensor([1.0, 0.5, 2.0]))
    recorder.add(3, "signal", "gain", [None], torch.tensor([4.0]))
    recorder.add(3, "signal", "cosine", [O1], torch.tensor([0.25]))
    assert [(r["metric"], r["layer"], r["value"]) for r in recorder.table().to_pylist()] == [
        ("gain", O0.name, 0.5),
        ("cosine", O1.name, 0.25),
    ]


def test_loggers_get_means_by_role_at_the_step_of_the_row_and_maxima_of_maxima() -> None:
    recorder, trainer = SignalRecorder(), fake_trainer()
    recorder.add(7, "gradient", "energy", [O0, O1, Q0], torch.tensor([1.0, 3.0, 5.0]))
    recorder.add(7, "signal", "max_abs", [O0, O1, BLOCK], torch.tensor([1.0, 3.0, 9.0]))
    recorder.add(7, "oscillation", "flipped", [O0, O1], torch.tensor([float("nan"), 0.25]))
    recorder.on_train_batch_end(trainer)
    assert trainer.loggers[0].rows == []  # nobody waits for values
    recorder.on_after_backward(trainer)  # of the next step
    ((step, numbers),) = trainer.loggers[0].rows
    assert step == 7 and numbers == {
        "grad/o/energy": 2, "grad/q/energy": 5, "grad/all/energy": 3,
        "signal/o/max_abs": 3, "signal/all/max_abs": 3, "signal/block/max_abs": 9,
        "oscillation/o/flipped": 0.25, "oscillation/all/flipped": 0.25,
    }  # fmt: skip
    recorder.on_train_batch_end(trainer)
    recorder.on_after_backward(trainer)
    recorder.on_train_end(trainer, None)
    assert len(trainer.loggers[0].rows) == 1  # nothing new, nothing logged


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize("end", ["on_train_end", "on_save_checkpoint", "on_exception"])
def test_the_last_steps_values_reach_file_and_loggers_once(end: str, run: bool, tmp_path: Path) -> None:
    recorder, trainer = SignalRecorder(tmp_path if run else None), fake_trainer()
    for step in (3, 4):
        recorder.add(step, "gradient", "energy", [O0], torch.tensor([float(step)]))
        recorder.on_train_batch_end(trainer)
    recorder.add(5, "gradient", "energy", [O0], torch.tensor([5.0]))  # of a step that is not over
    if run:  # whoever asks has them, the loggers as well later
        assert recorder.table()["step"].to_pylist() == [3, 4, 5]
    getattr(recorder, end)(trainer, None, *([ValueError()] if end == "on_exception" else []))
    recorder.on_after_backward(trainer)
    assert [step for step, _ in trainer.loggers[0].rows] == [3, 4, 5]
    assert not run or pq.read_table(tmp_path / "signals.parquet")["value"].to_pylist() == [3.0, 4.0, 5.0]


def test_only_the_first_process_logs_and_writes(tmp_path: Path) -> None:
    recorder, trainer = SignalRecorder(tmp_path), fake_trainer(is_global_zero=False)
    recorder.add(0, "gradient", "energy", [O0], torch.ones(1))
    recorder.on_train_batch_end(trainer)
    recorder.on_after_backward(trainer)
    recorder.on_save_checkpoint(trainer)
    assert trainer.loggers[0].rows == [] and list(tmp_path.iterdir()) == []


class Dies(Observer):
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 2:
            raise ValueError("it died")


def test_a_run_that_dies_leaves_its_signals(tmp_path: Path) -> None:
    observers = [GradientLog(every_n_steps=1, probe_every_n_steps=None), Dies()]
    with pytest.raises(ValueError, match="it died"):
        train(make_module(), [batch(2)] * 4, run=tmp_path, callbacks=observers)
    table = pq.read_table(tmp_path / "signals.parquet")
    assert set(table["step"].to_pylist()) == {0, 1, 2}  # step 2 was measured, and then it died


class DiesAtOnce(Observer):
    def on_after_backward(self, *_: Any) -> None:
        assert not gc.isenabled()  # the probe's pass is there
        raise ValueError("it died")


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dies", [False, True])
def test_the_garbage_collector_is_left_as_it_was(dies: bool, enabled: bool) -> None:
    class Collects(Observer):
        def on_train_batch_end(self, *_: Any) -> None:
            assert gc.isenabled() == enabled

    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ValueError, match="it died") if dies else nullcontext():
            train(make_module(), [batch(2)] * 4, callbacks=[SignalLog(), DiesAtOnce() if dies else Collects()])
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_signals_that_cannot_be_written_do_not_hide_why_the_run_died(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    recorder = SignalRecorder(tmp_path / "file" / "run")
    recorder.add(0, "gradient", "energy", [O0], torch.ones(1))
    trainer = fake_trainer()
    recorder.on_exception(trainer, None, ValueError())
    assert "signals.parquet could not be written" in caplog.text and len(trainer.loggers[0].rows) == 1


class Lost:
    """The event of a device that is gone."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_a_lost_device_takes_its_last_step_with_it_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, trainer = SignalRecorder(tmp_path), fake_trainer()
    recorder.add(0, "gradient", "energy", [O0], torch.ones(1))
    recorder.on_train_batch_end(trainer)
    recorder.on_after_backward(trainer)
    recorder.add(1, "gradient", "energy", [O0], torch.ones(1))
    recorder.on_train_batch_end(trainer)
    recorder._arriving = [one._replace(copied=Lost()) for one in recorder._arriving]
    recorder.on_exception(trainer, None, RuntimeError())
    assert "the last step's signals could not be read (CUDA error" in caplog.text
    assert pq.read_table(tmp_path / "signals.parquet")["step"].to_pylist() == [0]


def test_a_resumed_run_drops_rows_from_its_step_on_and_a_new_one_all(tmp_path: Path) -> None:
    first = SignalRecorder(tmp_path)
    for step in range(4):
        first.add(step, "gradient", "energy", [O0], torch.tensor([float(step)]))
    first.on_save_checkpoint(fake_trainer())
    for start, kept in ((2, [0, 1]), (0, [])):
        recorder = SignalRecorder(tmp_path)
        recorder.on_train_start(fake_trainer(start), None)
        assert recorder.table()["step"].to_pylist() == kept


def test_a_run_with_observers_writes_parquet_and_curves(tmp_path: Path) -> None:
    observers = [GradientLog(every_n_steps=2), SignalLog(every_n_steps=2), OscillationLog(every_n_steps=2)]
    train(make_module(), [batch(2, seed=n) for n in range(3)], run=tmp_path, callbacks=observers, log_every_n_steps=50)
    table = pq.read_table(tmp_path / "signals.parquet")
    assert table.schema.equals(SCHEMA) and set(table["source"].to_pylist()) == {"gradient", "signal", "oscillation"}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    for step in (0, 2):  # not multiples of log_every_n_steps
        for column in ("grad/o/energy", "signal/o/sqnr_db", "oscillation/o/flipped", "grad/all/update_ratio"):
            assert math.isfinite(float(rows[step][column]))
    by_hand = [r["value"] for r in table.to_pylist() if (r["step"], r["metric"], r["role"]) == (2, "sqnr_db", "o")]
    assert float(rows[2]["signal/o/sqnr_db"]) == pytest.approx(sum(by_hand) / len(by_hand))


def test_a_run_whose_guards_find_nothing_writes_no_signals(tmp_path: Path) -> None:
    train(make_module(), [batch(2)], run=tmp_path)
    assert not (tmp_path / "signals.parquet").exists()
    with pytest.raises(ValueError, match="GradientLog needs a SignalRecorder"):
        recorder_of(SimpleNamespace(callbacks=[]), "GradientLog")  # type: ignore[arg-type]


def test_two_observers_of_a_class_run_side_by_side(tmp_path: Path) -> None:
    twice = [make(every_n_steps=1, roles=[role]) for make in (GradientLog, SignalLog, OscillationLog) for role in "qo"]
    train(make_module(), [batch(2)], run=tmp_path, callbacks=twice)
    rows = pq.read_table(tmp_path / "signals.parquet").to_pylist()
    for source in ("gradient", "signal", "oscillation"):
        assert {row["role"] for row in rows if row["source"] == source} == {"q", "o"}


def quantized(model: str) -> kdqat.Student:
    return kdqat.quantize(model, "W4A16_G32", initializer=kdqat.RTN())


@pytest.mark.parametrize(("model", "gradients"), [("toy:llama", True), ("toy:bert_encoder", False), ("toy:gpt2", True)])
def test_signals_of_a_student_without_training(model: str, gradients: bool) -> None:
    rows = kdqat.signals(quantized(model), text="kdqat:prose", num_rows=2, num_tokens=16)
    assert {row["source"] for row in rows} == ({"signal", "gradient"} if gradients else {"signal"})
    assert all(set(row) == set(SCHEMA.names) and math.isfinite(row["value"]) for row in rows)
    sqnr = [row["value"] for row in rows if row["metric"] == "sqnr_db"]
    assert all(5 < value < 60 for value in sqnr)
    assert [row for row in rows if row["role"] == "block"]
    assert "| o |" in role_table(rows)


def test_signals_of_a_plan_without_a_layer_that_the_probe_sees() -> None:
    plan = kdqat.Uniform("W4A16_G32", ignore=["*_proj"], embeddings="W4A16_G32")
    student = kdqat.quantize("toy:llama", plan, initializer=kdqat.RTN())
    rows = kdqat.signals(student, text="kdqat:prose", num_rows=2, num_tokens=16)
    assert {(row["source"], row["role"]) for row in rows} == {("signal", "block"), ("signal", "attention")}


def test_signals_refuse_a_cached_teacher() -> None:
    with pytest.raises(ValueError, match="signals asks a live teacher"):
        kdqat.signals(quantized("toy:llama"), CachedTeacher(), "kdqat:prose")


def ratio(step: int, role: str, value: float) -> dict[str, Any]:
    return {"step": step, "metric": RATIO, "role": role, "value": value}


def test_the_recommender_takes_medians_over_steps_and_layers() -> None:
    rows = [ratio(step, role, value) for step in (0, 20) for role, value in (("q", 1.0), ("k", 1.1), ("up", 1.0))]
    rows += [ratio(0, "o", 3.0), ratio(20, "o", 2.0), ratio(20, "o", 100.0), ratio(20, "o", float("nan"))]
    answer = recommend(rows)
    assert list(answer.ratios) == ["o", "k", "q", "up"] and answer.ratios["o"] == 3.0
    assert answer.freeze == ("o",) and answer.sentence().startswith("freeze o: over 2 steps")
    assert "not measured here" in answer.sentence()


def test_the_recommender_may_say_nothing() -> None:
    assert recommend([ratio(0, "q", 1.0), ratio(0, "o", 1.2)]).sentence().startswith("freeze nothing: over 1 step no")
    with pytest.raises(ValueError, match="nothing to recommend from"):
        recommend([{"step": 0, "metric": "energy", "role": "o", "value": 1.0}])
