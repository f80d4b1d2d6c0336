"""`kdqat cache`, then `kdqat fit`, through the real command line."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.cli.case import named
from tests.cli.fork_server import server
from tests.cli.recipes import DROP, write
from tests.distributed.runs import curve
from tests.training.test_kill_resume import until


def teacher(**init_args: Any) -> dict[str, Any]:
    frozen = named("FrozenTeacher", dtype="float32")
    return named("CachedTeacher", teacher=frozen, **{"folder": "answers", "kind": "hidden", **init_args})


def cached_rows(folder: Path) -> int:
    total = 0
    for path in (folder / "answers").glob("rows-*"):
        with safe_open(path, "pt") as file:
            total += len(file.get_tensor("keys"))
    return total


def test_cache_then_fit_is_fit_with_the_live_teacher(tmp_path: Path) -> None:
    write(tmp_path, model__teacher=teacher())
    write(tmp_path, name="live.yaml", trainer__default_root_dir="live")
    refused = server().run(tmp_path, "fit", "recipe.yaml")
    assert refused.code == 2 and "0 of 307 rows are cached; run `kdqat cache RECIPE`" in refused.err
    filled = server().run(tmp_path, "cache", "recipe.yaml")
    assert filled.code == 0 and "row 307/307" in filled.err and "GiB are free" in filled.err
    assert not (tmp_path / "run" / "recipe.yaml").exists()  # not a matter of the run directory
    again = server().run(tmp_path, "cache", "recipe.yaml")
    assert again.code == 0 and "is complete: 307 rows" in again.err
    tables = [server().run(tmp_path, "fit", name) for name in ("recipe.yaml", "live.yaml")]
    assert tables[0].code == 0, tables[0].err
    assert tables[0].out == tables[1].out and "| kdqat:prose | student |" in tables[0].out
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("run", "live")]
    assert metrics[0] == metrics[1]
    validated = [server().run(tmp_path, "validate", name) for name in ("run", "live")]
    assert validated[0].code == 0 and validated[0].err.splitlines()[-1] == validated[1].err.splitlines()[-1]


def test_a_top_k_of_all_tokens_teaches_what_the_live_teacher_does_and_fewer_take_less_room(tmp_path: Path) -> None:
    write(tmp_path, name="live.yaml", evaluate=DROP, export=DROP, trainer__default_root_dir="live")
    for k in (260, 16):
        cached = teacher(kind="top_k", k=k, folder=f"answers{k}")
        write(tmp_path, name=f"{k}.yaml", model__teacher=cached, evaluate=DROP, export=DROP,
              trainer__default_root_dir=str(k))  # fmt: skip
        assert server().run(tmp_path, "cache", f"{k}.yaml").code == 0
        size = sum(path.stat().st_size for path in (tmp_path / f"answers{k}").glob("rows-*"))
        assert size == pytest.approx(307 * (32 * (4 * k + 4) + 24), rel=0.02)
    for name in ("live", "260", "16"):
        done = server().run(tmp_path, "fit", f"{name}.yaml")
        assert done.code == 0, done.err
    live, full, few = (curve(tmp_path / name, "train/kl") for name in ("live", "260", "16"))
    assert len(live) == 2 and full == pytest.approx(live, rel=0.02)  # probabilities are kept in fp16
    assert few != pytest.approx(live, rel=0.02)


def test_a_run_on_cached_answers_that_was_stopped_resumes_to_the_same_bits(tmp_path: Path) -> None:
    for name in ("stopped", "whole"):
        write(tmp_path, name=f"{name}.yaml", model__teacher=teacher(kind="top_k"), evaluate=DROP, export=DROP,
              trainer__default_root_dir=name, trainer__max_steps=12)  # fmt: skip
    assert server().run(tmp_path, "cache", "whole.yaml").code == 0
    command = server().start(tmp_path, "fit", "stopped.yaml", before="tests.cli.test_cache:slow_reads")
    assert until(command, (tmp_path / "begun").exists)
    command.kill(signal.SIGTERM)
    done = command.wait()
    assert done.code == 143 and "`kdqat fit stopped --resume` goes on" in done.err, done.err
    assert not (tmp_path / "stopped" / "student").exists()
    for name, how in (("stopped", ("--resume",)), ("whole", ())):
        done = server().run(tmp_path, "fit", f"{name}.yaml", *how)
        assert done.code == 0, done.err
    for file in ("student/model.safetensors", "student/quantizers.safetensors", "metrics.csv"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def slow_reads() -> None:
    """Answers take 50 ms to read; the fourth leaves a note."""
    from kdqat.models import CachedTeacher

    outputs, asked = CachedTeacher.outputs, []

    def slow(self: Any, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == 4:
            Path("begun").touch()
        time.sleep(0.05)
        return outputs(self, *args)

    CachedTeacher.outputs = slow  # type: ignore[method-assign]


def test_a_signal_keeps_what_was_answered_and_the_next_call_goes_on(tmp_path: Path) -> None:
    write(tmp_path, model__teacher=teacher())
    for number in (signal.SIGTERM, signal.SIGINT):
        command = server().start(tmp_path, "cache", "recipe.yaml", before="tests.cli.test_cache:slow_answers")
        before, deadline = cached_rows(tmp_path), time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "begun").unlink()
        command.kill(number)
        done = command.wait()
        assert done.code == 128 + number and "rows to go; `kdqat cache recipe.yaml` goes on" in done.err, done.err
        assert before < cached_rows(tmp_path) < 307
    assert server().run(tmp_path, "cache", "recipe.yaml").code == 0 and cached_rows(tmp_path) == 307
    assert not list((tmp_path / "answers").glob(".*"))


def slow_answers() -> None:
    """An answer takes 50 ms; the third one leaves a note."""
    from kdqat.models import CachedTeacher

    ask, asked = CachedTeacher._ask, []

    def slow(self: Any, batch: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            Path("begun").touch()
        time.sleep(0.05)
        return ask(self, batch)

    CachedTeacher._ask = slow  # type: ignore[method-assign]


def test_bad_input_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    for changes, words in (
        ({}, "model.teacher is a FrozenTeacher, which caches nothing; cache needs a CachedTeacher"),
        ({"model__teacher": None}, "model.teacher is none"),
        ({"model__teacher": teacher(), "data": DROP}, "cache needs a data section"),
        ({"model__teacher": teacher(kind="logits")}, "kind"),
        ({"model__teacher": named("SharedTeacher")}, "model.teacher is a SharedTeacher, which caches nothing"),
    ):
        write(tmp_path, **changes)
        done = server().run(tmp_path, "cache", "recipe.yaml")
        assert done.code == 2 and words in done.err and len(done.err.strip().splitlines()) == 1, done.err


def test_another_teacher_in_the_folder_is_named_and_the_run_refused(tmp_path: Path) -> None:
    write(tmp_path, model__teacher=teacher())
    assert server().run(tmp_path, "cache", "recipe.yaml").code == 0
    write(tmp_path, model__teacher=teacher(), model__student__path="toy:qwen2")
    for verb in ("fit", "cache"):
        done = server().run(tmp_path, verb, "recipe.yaml")
        assert done.code == 2 and "was made with another model (" in done.err and "`folder`" in done.err


def test_a_shared_teacher_trains_scales_through_every_verb(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path, model__teacher=named("SharedTeacher"), model__trainable="scales")
    for verb in ("quantize", "fit", "validate", "eval"):
        options = ("--overwrite",) if verb == "eval" else ()
        done = server().run(tmp_path, verb, "recipe.yaml", *options)
        assert done.code == 0, done.err
    before, after = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("prepared", "student"))
    assert all((before[name] == after[name]).all() for name in before)
    before, after = (load_file(tmp_path / "run" / name / "quantizers.safetensors") for name in ("prepared", "student"))
    assert any((before[name] != after[name]).any() for name in before)
