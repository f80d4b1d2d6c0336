"""Evaluators against the same numbers computed in one piece from full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdqat import api
from kdqat.data import TextSource, windows
from kdqat.evaluators import Perplexity, TeacherAgreement
from kdqat.models import FrozenTeacher
from kdqat.student import Student

OPTIONS: dict[str, Any] = {"seq_len": 40, "limit": 7, "batch_size": 3}


@pytest.fixture(scope="module")
def student() -> Student:
    student = api.quantize("toy:llama", "W2A16_G32")
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # sharper than a random toy, so that the models differ
    return student


@pytest.fixture(scope="module")
def teacher(student: Student) -> FrozenTeacher:
    teacher = FrozenTeacher(dtype="float32")
    teacher.prepare(student.source, student.split, student.tokenizer, pristine=False)
    return teacher


def logits(student: Student, teacher: FrozenTeacher) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = windows("kdqat:prose", student.tokenizer, OPTIONS["seq_len"], limit=OPTIONS["limit"])
    assert teacher.split is not None
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits[:, :-1].double() for model in (student.model, teacher.split.model))
    return ours, theirs, ids[:, 1:]


def test_numbers_are_those_of_the_full_logits(
    student: Student, teacher: FrozenTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdqat.evaluators.agreement.CHUNK_TOKENS", 50)  # chunks that end inside a window
    student.split.eval()
    numbers = TeacherAgreement("kdqat:prose", **OPTIONS).evaluate(student, teacher)
    ours, theirs, labels = logits(student, teacher)
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).flatten()
    assert numbers["tokens"] == 7 * 39 == kl.numel()
    assert numbers["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4) and numbers["kl_mean"] > 0.05
    assert numbers["kl_p95"] == pytest.approx(float(kl.sort().values[round(0.95 * len(kl)) - 1]), rel=1e-3)
    assert numbers["top1"] == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    for name, side in (("perplexity", ours), ("teacher_perplexity", theirs)):
        nll = F.cross_entropy(side.flatten(0, 1), labels.flatten())
        assert numbers[name] == pytest.approx(float(nll.exp()), rel=1e-4)


def test_perplexity_agrees_and_needs_no_teacher(student: Student, teacher: FrozenTeacher) -> None:
    student.split.eval()
    both = TeacherAgreement("kdqat:prose", **OPTIONS).evaluate(student, teacher)
    alone = Perplexity("kdqat:prose", **OPTIONS).evaluate(student, None)
    beside = Perplexity("kdqat:prose", **OPTIONS).evaluate(student, teacher)
    assert set(alone) == {"perplexity", "tokens"}
    assert alone["perplexity"] == beside["perplexity"] == pytest.approx(both["perplexity"], rel=1e-6)
    assert beside["teacher_perplexity"] == pytest.approx(both["teacher_perplexity"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_batch_size_changes_nothing(batch_size: int, student: Student, teacher: FrozenTeacher) -> None:
    student.split.eval()
    one = TeacherAgreement("kdqat:prose", **OPTIONS).evaluate(student, teacher)
    other = TeacherAgreement("kdqat:prose", **{**OPTIONS, "batch_size": batch_size}).evaluate(student, teacher)
    assert one == pytest.approx(other, rel=1e-4)


def test_agreement_without_a_teacher_says_what_to_use(student: Student) -> None:
    with pytest.raises(
        ValueError, match=r"evaluate kdqat:prose: TeacherAgreement needs model\.teacher; use Perplexity"
    ):
        TeacherAgreement("kdqat:prose").evaluate(student, None)


@pytest.mark.parametrize(
    ("text", "label"),
    [("kdqat:prose", "kdqat:prose"), ("some/where/notes.txt", "notes"), ("c4.jsonl.gz", "c4"),
     (TextSource(path="a/b.jsonl"), "b"), (["x/first.txt", "second.txt"], "first")],
    ids=str,
)  # fmt: skip
def test_a_text_names_its_numbers(text: Any, label: str) -> None:
    assert Perplexity(text).label == label
    assert Perplexity(text, label="mine").label == "mine"


def test_windows_longer_than_the_positions_are_refused(student: Student) -> None:
    with pytest.raises(ValueError, match="seq_len 513 exceeds the model's 512 positions"):
        Perplexity("kdqat:prose", seq_len=513).evaluate(student, None)


@pytest.mark.parametrize("wrong", [{"seq_len": 1}, {"batch_size": 0}, {"limit": 0}], ids=str)
def test_arguments_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="an evaluator needs"):
        Perplexity("kdqat:prose", **wrong)


def test_a_text_of_ones_own_is_read_from_its_file(student: Student, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("all work and no play makes a dull text. " * 10)
    numbers = Perplexity(str(tmp_path / "own.txt"), seq_len=32).evaluate(student, None)
    assert numbers["tokens"] == 12 * 31
