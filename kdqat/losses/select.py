"""Which positions of a batch count: the one place where labels are shifted and masks are applied.

Position t predicts labels[t + 1]. It counts if that label is not IGNORE_INDEX, neither t nor t + 1 is padding,
and both lie in the same packed document: the last token of one document does not predict the first of the next.
Distillation losses use the same positions as cross-entropy, so that their terms share one denominator.

Letters in shapes: B batch, T tokens, N positions that count.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from kdqat.types import IGNORE_INDEX, Batch

Reduction = Literal["token_mean", "sequence_sum"]

# by the labels: attention mask, segments, positions
_remembered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def target_mask(batch: Batch) -> Tensor:
    """[B, T] bool: True where position t has a next token that counts. The last column is always False."""
    valid = batch.labels[:, 1:] != IGNORE_INDEX
    if batch.attention_mask is not None:
        real = batch.attention_mask.bool()
        valid = valid & real[:, 1:] & real[:, :-1]
    if batch.segment_ids is not None:
        valid = valid & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])
    return pad(valid, (0, 1), value=False)


def target_positions(batch: Batch) -> Tensor:
    """[N] int64: the positions that count, as indices into the flattened [B * T]; the labels lie one further.

    Waits for the device, unless it was told to remember this batch's.
    """
    known = _remembered.get(batch.labels)
    if known is not None and known[0] is batch.attention_mask and known[1] is batch.segment_ids:
        return known[2]
    return target_mask(batch).flatten().nonzero().squeeze(1)


def remember_positions(batch: Batch) -> None:
    """Have `target_positions` know those of `batch`, whose tensors nobody changes in place, as long as its labels live:
    for a batch that is asked about while the device is busy."""
    _remembered[batch.labels] = batch.attention_mask, batch.segment_ids, target_positions(batch)


def rows_at(values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
    """The rows of `values` [B, T, ...] at `positions` [N], [N, ...].

    Raises:
        ValueError: if `values` does not have the batch's B and T.
    """
    if values.shape[:2] != batch.labels.shape:
        raise ValueError(
            f"a model answered {tuple(values.shape[:2])} positions to a batch of {tuple(batch.labels.shape)}: "
            "teacher and student must see the batch's own tokens, none added (BOS, prefix) and none dropped"
        )
    return values.flatten(0, 1).index_select(0, positions)


def num_targets(batch: Batch, reduction: Reduction = "token_mean") -> Tensor:
    """What a loss over `batch` is divided by, 0-D int64; known before any forward pass.

    "token_mean": the positions that count. "sequence_sum": the rows [b] of the batch with at least one such
    position; a row of packed documents is one sequence, as in the code whose "batchmean" this reproduces.
    """
    mask = target_mask(batch)
    return mask.sum() if reduction == "token_mean" else mask.any(dim=1).sum()
