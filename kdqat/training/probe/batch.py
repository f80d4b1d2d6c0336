"""The probe's batch: a corner of a batch of training data, the same for the whole run."""

from __future__ import annotations

from torch import Tensor

from kdqat.losses.select import num_targets
from kdqat.types import Batch


def cut(batch: Batch, num_rows: int, num_tokens: int) -> Batch:
    """The first `num_rows` rows of `batch`, and of these the first `num_tokens` tokens, copied.

    Where none of these tokens is a target (a long prompt of a chat), all of them become targets.
    """

    def corner(tensor):  # type: ignore[no-untyped-def]
        return None if tensor is None else tensor[:num_rows, :num_tokens].clone()

    ids, labels = corner(batch.input_ids), corner(batch.labels)
    rest = (corner(batch.attention_mask), corner(batch.segment_ids), corner(batch.position_ids))
    small = Batch(ids, labels, *rest)
    return small if int(num_targets(small)) else small._replace(labels=ids)


def real_positions(batch: Batch) -> Tensor | None:
    """[n] indices of the tokens among B * T that are no padding; None: all of them. Waits for the device."""
    return None if batch.attention_mask is None else batch.attention_mask.flatten().nonzero().squeeze(1)
