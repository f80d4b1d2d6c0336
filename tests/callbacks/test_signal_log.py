"""SignalLog's numbers on tensors that can be reckoned by hand, and on the toy against `kdqat.signals`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from kdqat import api
from kdqat.callbacks import SignalLog
from kdqat.losses import CrossEntropy
from kdqat.models import FrozenTeacher
from kdqat.training.measure import measure_signals
from kdqat.training.probe import Seen, compare, cut
from kdqat.training.probe.capture import entropy
from kdqat.training.signals import SignalRecorder
from tests.training.toy import Loader, batch, make_module, train


def values_of(student: Any, teacher: Any) -> dict[str, float]:
    seen = [Seen({"layer": torch.tensor(y)}, {}, {}) for y in (student, teacher)]
    return {metric: float(values) for metric, (_, values) in compare(*seen).items()}


def test_every_number_is_what_its_formula_says() -> None:
    numbers = values_of([[[3.0, 0.0], [0.0, -2.0]]], [[[3.0, 4.0], [0.0, -1.0]]])
    assert numbers["sqnr_db"] == pytest.approx(10 * math.log10(26 / 17))  # noise 4^2 + 1^2
    assert numbers["gain"] == pytest.approx(13 / 26)
    assert numbers["cosine"] == pytest.approx((3 / 5 + 1) / 2)
    assert numbers["mean_abs"] == pytest.approx(5 / 4) and numbers["teacher_mean_abs"] == pytest.approx(2)
    assert numbers["variance"] == pytest.approx(13 / 4 - (1 / 4) ** 2)
    assert numbers["max_abs"] == 3 and numbers["teacher_max_abs"] == 4


def test_entropy_is_that_of_every_token_in_nats() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert torch.allclose(entropy(weights), torch.tensor([[[0.0, math.log(2)]]]))


def rows_of(trainer: Any) -> list[dict[str, Any]]:
    (recorder,) = (c for c in trainer.callbacks if isinstance(c, SignalRecorder))
    return recorder.table().to_pylist()


def test_step_zero_is_the_student_before_its_first_update() -> None:
    batches, untrained = [batch(2, seed=n) for n in range(3)], make_module()
    student = untrained.build()
    expected = measure_signals(student, untrained.teacher, cut(batches[0], 1, 256))
    rows = rows_of(train(make_module(), batches, callbacks=[SignalLog(every_n_steps=2)]))
    assert {row["step"] for row in rows} == {0, 2}
    found = {(row["metric"], row["role"], row["layer"]): row["value"] for row in rows if row["step"] == 0}
    wanted = {(r["metric"], r["role"], r["layer"]): r["value"] for r in expected if r["source"] == "signal"}
    assert found == pytest.approx(wanted)
    places = {(role, layer) for metric, role, layer in found if metric == "sqnr_db"}
    assert {("block", "model.layers.1"), ("o", "model.layers.0.self_attn.o_proj")} <= places
    assert {role for metric, role, _ in found if metric == "entropy"} == {"attention"}


def test_a_selection_of_layers_leaves_out_blocks_and_attention() -> None:
    rows = rows_of(train(make_module(), [batch(2)], callbacks=[SignalLog(roles=["o"])]))
    assert {row["role"] for row in rows} == {"o"} and len(rows) == 2 * 9


def test_the_probe_batch_is_the_same_after_a_resume(tmp_path: Path) -> None:
    batches = [batch(2, seed=n) for n in range(4)]

    def run(name: str, *steps: int) -> list[dict[str, Any]]:
        for step in steps:
            args = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": step,
                    "callbacks": [SignalLog(every_n_steps=1, num_tokens=7)]}  # fmt: skip
            trainer = api.make_trainer(args, tmp_path / name)
            module = make_module(scheduler=None)
            newest = sorted((tmp_path / name).glob("checkpoints/step=*.ckpt"))
            others = Loader(batches[::-1] if newest else batches)  # the second run begins with another batch
            trainer.fit(module, others, ckpt_path=newest[-1] if newest else None, weights_only=True)
        return pq.read_table(tmp_path / name / "signals.parquet").to_pylist()

    def teacher_of_last(rows: list[dict[str, Any]]) -> dict[str, float]:
        return {row["layer"]: row["value"] for row in rows if row["step"] == 2 and row["metric"] == "teacher_mean_abs"}

    resumed, whole = run("resumed", 2, 3), run("whole", 3)
    assert teacher_of_last(resumed) == teacher_of_last(whole) != {}
    assert sorted({row["step"] for row in resumed}) == [0, 1, 2]
    assert len(resumed) == len(whole)


def test_a_teacher_of_another_shape_is_refused_by_name() -> None:
    student, teacher = (Seen({"model.layers.0": torch.zeros(1, 2, width)}, {}, {}) for width in (3, 4))
    with pytest.raises(
        ValueError, match=r"model\.layers\.0 answers \(1, 2, 3\).*teacher of the student's architecture"
    ):
        compare(student, teacher)


def test_it_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"SignalLog asks a live teacher.*is none"):
        train(make_module(teacher=None, loss=CrossEntropy()), [batch(2)], callbacks=[SignalLog()])


def test_a_teacher_in_another_dtype_is_compared_in_fp32() -> None:
    rows = rows_of(train(make_module(teacher=FrozenTeacher(dtype="bfloat16")), [batch(2)], callbacks=[SignalLog()]))
    assert all(math.isfinite(row["value"]) for row in rows)
