"""Shift, masks and counts."""

from __future__ import annotations

import pytest
import torch

from kdqat.losses import select
from kdqat.losses.select import num_targets, remember_positions, rows_at, target_mask, target_positions
from kdqat.types import IGNORE_INDEX, Batch
from tests.losses.toy import ragged_batch, random_batch
from tests.models.waits import Waits


def test_the_last_position_of_a_row_predicts_nothing():
    mask = target_mask(random_batch(2, 4))
    assert mask.tolist() == [[True, True, True, False]] * 2


def test_position_t_counts_when_label_t_plus_one_is_not_ignored():
    labels = torch.tensor([[IGNORE_INDEX, 1, IGNORE_INDEX, 3]])
    mask = target_mask(Batch(torch.zeros_like(labels), labels))
    assert mask.tolist() == [[True, False, True, False]]


def test_padding_counts_neither_as_source_nor_as_target():
    labels = torch.arange(5)[None]
    mask = target_mask(Batch(labels, labels, attention_mask=torch.tensor([[0, 1, 1, 1, 0]])))
    assert mask.tolist() == [[False, True, True, False, False]]


def test_the_end_of_a_document_does_not_predict_the_start_of_the_next():
    labels = torch.arange(6)[None]
    mask = target_mask(Batch(labels, labels, segment_ids=torch.tensor([[0, 0, 0, 1, 1, 2]])))
    assert mask.tolist() == [[True, True, False, True, False, False]]


def test_positions_index_the_flattened_batch_and_labels_lie_one_further():
    batch = ragged_batch()
    positions = target_positions(batch)
    assert len(positions) == target_mask(batch).sum()
    assert (batch.labels.flatten()[positions + 1] != IGNORE_INDEX).all()
    hidden = torch.randn(4, 7, 3)
    assert torch.equal(rows_at(hidden, positions, batch), hidden[target_mask(batch)])


def test_tokens_are_counted_for_token_mean_and_rows_with_a_target_for_sequence_sum():
    batch = ragged_batch()
    assert num_targets(batch).item() == 6 + 4 + 5
    assert num_targets(batch, "sequence_sum").item() == 3
    assert num_targets(batch).dtype == torch.int64


def test_a_row_of_one_token_has_no_target():
    batch = random_batch(2, 1)
    assert num_targets(batch).item() == 0 and len(target_positions(batch)) == 0


def test_an_answer_of_another_length_is_refused():
    batch = random_batch(2, 4)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4\)"):
        rows_at(torch.zeros(2, 5, 3), target_positions(batch), batch)


def test_remembered_positions_are_the_same_and_nobody_waits_for_them():
    batch = ragged_batch()
    expected = target_positions(batch)
    remember_positions(batch)
    with Waits() as waits:
        assert target_positions(batch) is target_positions(batch)
    assert waits.count == 0 and torch.equal(target_positions(batch), expected)


def test_positions_are_remembered_of_that_batch_alone_and_as_long_as_it_lives():
    batch = random_batch(2, 4)
    remember_positions(batch)
    padded = batch._replace(attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    assert target_positions(padded).tolist() == [0, 4, 5, 6]  # other positions of the same labels
    assert target_positions(batch._replace(labels=torch.full_like(batch.labels, IGNORE_INDEX))).tolist() == []
    before = len(select._remembered)
    del batch, padded
    assert len(select._remembered) == before - 1
