"""Calibration text is packed windows, spread over the text, the same for the same seed."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdqat.calibrate import calibration_batches
from kdqat.data import windows
from kdqat.models.toy import toy_tokenizer

PROSE = "kdqat:prose"


def chosen(seed: int | None = None, num_rows: int = 7) -> torch.Tensor:
    batches = calibration_batches(PROSE, toy_tokenizer(), seq_len=64, num_rows=num_rows, batch_size=3, seed=seed)
    assert [len(batch.input_ids) for batch in batches] == [3, 3, 1][: len(batches)]
    assert all(batch.attention_mask is None and torch.equal(batch.labels, batch.input_ids) for batch in batches)
    return torch.cat([batch.input_ids for batch in batches])


def positions(rows: torch.Tensor) -> list[int]:
    every = windows(PROSE, toy_tokenizer(), 64)
    return [int((every == row).all(1).nonzero()[0]) for row in rows]


def test_without_a_seed_windows_are_spread_evenly():
    found, every = positions(chosen()), len(windows(PROSE, toy_tokenizer(), 64))
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert found[0] == 0 and max(gaps) - min(gaps) <= 1 and found[-1] >= every * 6 // 7


def test_with_a_seed_they_are_drawn_without_repetition_and_reproducibly():
    found = positions(chosen(seed=1))
    assert found == positions(chosen(seed=1)) and len(set(found)) == 7
    assert found != positions(chosen(seed=2)) and found != positions(chosen())


def test_a_text_that_is_too_short_says_what_to_lower():
    with pytest.raises(ValueError, match=r"has \d+ rows of seq_len=64, fewer than num_rows=100000: lower num_rows or"):
        chosen(num_rows=100_000)
    with pytest.raises(ValueError, match="fewer than one row of seq_len=1000000"):
        calibration_batches(PROSE, toy_tokenizer(), seq_len=1_000_000)


@pytest.mark.parametrize("key", ["seq_len", "num_rows", "batch_size"])
def test_numbers_below_one_are_refused(key):
    with pytest.raises(ValueError, match="seq_len, num_rows and batch_size >= 1"):
        calibration_batches(PROSE, toy_tokenizer(), **{key: 0})
