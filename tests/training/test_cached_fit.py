"""Training from a cache: every row is found, whatever the order, and the run is that of the live teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat import api
from kdqat.data import ChatTurns, PackedText, TextData
from kdqat.initializers import RTN
from kdqat.losses import AttentionTransfer
from kdqat.models import CachedTeacher, FrozenTeacher, SharedTeacher
from kdqat.models.toy import toy_tokenizer
from kdqat.student import Student

TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDQAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("".join(f"line {i} of the corpus\n" for i in range(60)))
    turns = [f'{{"prompt": "q{i}", "completion": "{"yes " * (i % 5 + 1)}"}}\n' for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(turns))
    return tmp_path


def text(folder: Path, **changes: Any) -> PackedText:
    return PackedText(str(folder / "a.txt"), **{"seq_len": 16, "batch_size": 2, "val_rows": 4, **changes})


def chats(folder: Path, **changes: Any) -> ChatTurns:
    arguments = {"chat_template": TEMPLATE, "seq_len": 64, "batch_size": 2, "val_rows": 4, **changes}
    return ChatTurns(str(folder / "chats.jsonl"), **arguments)


def teacher(**changes: Any) -> CachedTeacher:
    return CachedTeacher(FrozenTeacher(dtype="float32"), **{"kind": "hidden", **changes})


def fit(data: TextData, teacher: Any, **changes: Any) -> Student:
    student = api.quantize("toy:llama", "W4A16_G32", initializer=RTN())
    arguments: dict[str, Any] = {"steps": 3, "accelerator": "cpu", "enable_progress_bar": False, **changes}
    return api.fit(student, data=data, teacher=teacher, **arguments)


def same(one: Student, other: Student) -> bool:
    others = dict(other.split.named_parameters())
    return all(torch.equal(p, others[name]) for name, p in one.split.named_parameters())


@pytest.mark.parametrize("make", [text, partial(text, document_mask=True), chats, partial(chats, packing=True)],
                         ids=["packed", "documents apart", "chats", "packed chats"])  # fmt: skip
def test_training_from_the_cache_is_training_with_the_live_teacher(make: Callable[..., TextData], folder: Path) -> None:
    assert api.cache("toy:llama", teacher(), make(folder)) == 0
    assert same(fit(make(folder), teacher()), fit(make(folder), FrozenTeacher(dtype="float32")))


def test_reshuffled_rows_in_other_batches_and_on_other_ranks_are_all_found(folder: Path) -> None:
    api.cache("toy:llama", teacher(), text(folder))
    for changes in ({"shuffle_seed": 5}, {"batch_size": 3}, {"val_rows": 9}):
        fit(text(folder, **changes), teacher(), max_epochs=2, steps=-1)  # a missing row would raise
    ready = teacher()
    student = api.quantize("toy:llama", "W4A16_G32", initializer=RTN())
    ready.prepare(student.source, student.split, student.tokenizer, pristine=False)
    for rank in range(2):
        data = text(folder, shuffle_seed=3)
        data.rank_and_world = lambda rank=rank: {"rank": rank, "world_size": 2}  # type: ignore[method-assign]
        api.bind_data(data, student)
        for batch in data.train_dataloader():
            ready.outputs(batch)


def test_a_resumed_run_finds_its_rows_and_ends_the_same(folder: Path) -> None:
    api.cache("toy:llama", teacher(), text(folder))
    ends = []
    for name, stops in (("whole", [4]), ("cut", [2, 4])):
        for stop in stops:
            student = api.quantize("toy:llama", "W4A16_G32", initializer=RTN())
            module = api.KDQATModule.from_student(
                student, plan=api.Uniform("W4A16"), quantizer=api.LSQ, loss=api.ForwardKL(),
                optimizer=partial(torch.optim.AdamW, lr=1e-3), teacher=teacher(),
            )  # fmt: skip
            data, saved = text(folder), folder / name / "checkpoints" / f"step={stop - 2:08d}.ckpt"
            api.bind_data(data, student)
            args = {"accelerator": "cpu", "devices": 1, "max_steps": stop, "enable_progress_bar": False}
            trainer = api.make_trainer(args, folder / name)
            trainer.fit(module, datamodule=data, ckpt_path=saved if saved.exists() else None, weights_only=True)
        ends.append(student)
    assert same(*ends)


@pytest.mark.parametrize("change", [{"seq_len": 15}, {"document_mask": True}, {"limit": 1, "seq_len": 8}])
def test_other_rows_are_missed_before_the_first_step(change: dict[str, Any], folder: Path) -> None:
    api.cache("toy:llama", teacher(), text(folder))
    with pytest.raises(ValueError, match=r"cache .*: 0 of \d+ rows are cached; run `kdqat cache RECIPE` \(another seq"):
        fit(text(folder, **change), teacher())


def test_streamed_text_and_losses_on_attention_are_refused_before_the_first_step(folder: Path) -> None:
    with pytest.raises(ValueError, match="streaming: false"):
        fit(text(folder, streaming=True), teacher())
    with pytest.raises(ValueError, match="keeps no attentions"):
        fit(text(folder), teacher(), loss=AttentionTransfer())
    with pytest.raises(ValueError, match="streaming: false"):
        api.cache("toy:llama", teacher(), text(folder, streaming=True))


def test_what_is_cached_is_passed_over_and_a_stop_leaves_the_rest(folder: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    asked = iter([False, False, True])
    missing = api.cache("toy:llama", teacher(), text(folder), stop=lambda: next(asked))
    total = len(text_keys(folder))
    assert len(set(text_keys(folder))) == missing + 6 < total  # three batches of two; this text repeats a row
    assert f"{missing + 6} of {total} rows are to be answered; they take 0.000 GiB" in caplog.text
    assert api.cache("toy:llama", teacher(), text(folder)) == 0
    assert f"{missing} of {total} rows are to be answered" in caplog.text
    caplog.clear()
    loaded = teacher()
    assert api.cache("toy:llama", loaded, text(folder)) == 0
    assert f"is complete: {total} rows" in caplog.text and loaded.teacher.split is None


def test_answers_that_do_not_fit_on_the_disk_are_not_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr("kdqat.training.fill.shutil.disk_usage", lambda path: usage(10, 10, 1000))
    ready = teacher()
    with pytest.raises(ValueError, match=r"rows need 0\.000 GiB, 0\.000 GiB are free: use another `folder`"):
        api.cache("toy:llama", ready, text(folder))
    assert ready.cache is not None and not ready.cache.folder.exists()


def test_evaluators_are_answered_by_the_live_teacher_which_is_let_go(folder: Path) -> None:
    student = api.quantize("toy:llama", "W4A16_G32", initializer=RTN())
    evaluator, cached = api_evaluator(), teacher(kind="top_k")
    assert api.evaluate(student, [evaluator], cached) == api.evaluate(student, [evaluator])
    assert cached.teacher.split is None and cached.judge() is cached.teacher
    assert SharedTeacher().judge().shares_weights
    api.cache("toy:llama", cached, text(folder))
    with pytest.raises(ValueError, match="CachedTeacher"):
        evaluator.evaluate(student, cached)


def text_keys(folder: Path) -> list[bytes]:
    data = text(folder)
    data.bind(toy_tokenizer())
    return data.row_keys()


def api_evaluator() -> Any:
    from kdqat.evaluators import TeacherAgreement

    return TeacherAgreement("kdqat:prose", seq_len=32, limit=2)
