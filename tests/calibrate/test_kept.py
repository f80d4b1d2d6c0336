"""Statistics that are kept: a second run does not listen again, and finds the same."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdqat.allocate import Uniform
from kdqat.calibrate import (
    AbsMax,
    AbsMean,
    BlockCall,
    Calibration,
    Hessian,
    InputSample,
    KeptStatistics,
    Range,
    stream_blocks,
)
from kdqat.initializers import AWQ, GPTQ, RTN, Initializer
from kdqat.models import ModelSource
from kdqat.quant import Fixed
from kdqat.student import Student, prepare_student
from tests.calibrate.toy import split_model, texts

TEXT = Calibration("kdqat:prose", seq_len=32, num_rows=4, batch_size=2)


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """The blocks that were run to be listened to."""
    blocks: list[str] = []
    run = BlockCall.run

    def counted(self, *args, **kwargs):
        blocks.append(self.prefix)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(BlockCall, "run", counted)
    return blocks


def prepared(
    keep: Path | None, scheme: str = "W4A16_G32", initializer: Initializer | None = None, **changes
) -> Student:
    source = ModelSource(changes.pop("model", "toy:llama"), changes.pop("dtype", "float32"))
    text = replace(TEXT, keep=None if keep is None else str(keep), **changes)
    plan = Uniform(scheme, ignore=("lm_head",))
    return prepare_student(source, plan, Fixed, initializer or AWQ(num_ratios=4, num_clip_steps=3), calibration=text)


def test_a_second_run_listens_to_nothing_and_gives_the_same_student(tmp_path, runs, caplog):
    caplog.set_level(logging.INFO)
    plain = prepared(None).model.state_dict()
    first = prepared(tmp_path).model.state_dict()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.layers.0.safetensors",
        "model.layers.1.safetensors",
    ]
    before = len(runs)
    second = prepared(tmp_path).model.state_dict()
    assert before and len(runs) == before
    assert caplog.text.count("statistics of an earlier run are read from") == 1
    for name, tensor in plain.items():
        assert torch.equal(tensor, first[name]) and torch.equal(tensor, second[name]), name


def test_another_plan_reads_the_same_statistics(tmp_path, runs):
    prepared(tmp_path)
    before = len(runs)
    other = prepared(tmp_path, "W3A16_ASYM_G16").model.state_dict()
    assert len(runs) == before
    expected = prepared(None, "W3A16_ASYM_G16").model.state_dict()
    # layers that no fold covers were heard behind the first plan's folds: the same function, rounded otherwise
    assert all(torch.allclose(other[name], tensor, rtol=1e-3, atol=1e-4) for name, tensor in expected.items())


def test_what_is_missing_is_heard_and_added(tmp_path, runs):
    prepared(tmp_path, "W4A16_G32")
    file = tmp_path / "model.layers.1.safetensors"
    whole = load_file(file)
    file.unlink()
    before = len(runs)
    prepared(tmp_path)
    assert set(runs[before:]) == {"model.layers.1"}
    again = load_file(file)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_rows": 2}, "text"),
        ({"model": "toy:qwen3"}, "model"),
        ({"seed": 1}, "text"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_statistics_of_something_else_are_refused_by_file_and_left_alone(tmp_path, changes, what):
    prepared(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"model.layers.0.safetensors: these statistics are of another {what}"):
        prepared(tmp_path, **changes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_damaged_file_is_named(tmp_path):
    prepared(tmp_path)
    (tmp_path / "model.layers.0.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"model.layers.0.safetensors: .*remove it"):
        prepared(tmp_path)


def test_what_hears_quantized_blocks_keeps_nothing_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        prepared(tmp_path / "kept", initializer=GPTQ())
    assert "calibration.keep: GPTQ hears what its own quantized blocks give" in caplog.text
    assert not (tmp_path / "kept").exists()
    kept = KeptStatistics(tmp_path, model="a", dtype="float32", text="b")
    with pytest.raises(ValueError, match="is of this run alone"):
        next(stream_blocks(split_model("llama"), texts(), sequential=True, kept=kept))


def test_what_counts_nothing_that_is_kept_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        prepared(tmp_path / "kept", "W8A8_STATIC", RTN())
    assert "calibration.keep: RTN counts nothing that is kept" in caplog.text and not (tmp_path / "kept").exists()
    with caplog.at_level(logging.INFO):
        prepared(tmp_path / "kept")
    assert "AWQ counts nothing" not in caplog.text


@pytest.mark.parametrize("kind", [AbsMax, AbsMean, Range, Hessian])
def test_every_statistic_goes_on_from_its_state(kind):
    x, more = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    whole, half, again = kind(), kind(), kind()
    whole.update(x)
    half.update(x)
    again.load({name: tensor.clone() for name, tensor in half.state().items()})
    for one in (whole, again):
        one.update(more)
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), again.state().values(), strict=True))
    with pytest.raises(ValueError, match="has seen no input"):
        kind().state()


def test_samples_of_inputs_are_none_of_them():
    assert not hasattr(InputSample, "state")  # thousands of rows of every layer
