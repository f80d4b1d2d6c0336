"""A teacher that kept its k likeliest tokens: a full distribution is made of them and the student's own tail.

    log p_v = the stored log-probability                   v among the k
    log p_v = log q_v - log q_tail + log p_tail            elsewhere, without gradient to q

Outside the k the teacher is taken to share the student's opinion of who gets how much of the stored tail mass. There
p_v / q_v is one number, so every f-divergence (both KLs, JSD, TVD) equals that over k + 1 buckets, the k tokens and
"any other", in value and in gradient: the tail as a whole is trained, its inside is not. Any loss on logits works
with it, unaware; but a token of the tail may come out likelier than a kept one. Dropping the tail and renormalising
the k would teach the student to give the rest nothing (https://arxiv.org/abs/2503.16870).

Rounding is undone first: stored in 16 bits, the k probabilities and the tail sum to 1 within some 1e-3 only, so all
k + 1 are divided by their sum. At a temperature other than 1 the rebuilt distribution is tempered, which is an
approximation: a tempered teacher would need the shape of its own tail.

Letters in shapes: n rows of a chunk, k kept tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdqat.metrics import log_probs


class TopKRows(NamedTuple):
    """`TopKOutputs` at some positions."""

    ids: Tensor  # [n, k] int64, distinct in a row
    log_probs: Tensor  # [n, k]
    log_tail: Tensor  # [n]


def dense_log_probs(teacher: TopKRows, student_logits: Tensor) -> Tensor:
    """The teacher's log-probabilities [n, V] over the vocabulary of `student_logits` [n, V], fp32, no gradient."""
    log_q = log_probs(student_logits.detach())
    kept, log_tail = teacher.log_probs.to(log_q.dtype), teacher.log_tail.to(log_q.dtype)
    log_sum = torch.logaddexp(kept.logsumexp(-1), log_tail)
    # over the tail itself: 1 - (the mass of the k) has no digits left where the student is sure
    log_q_tail = log_q.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1)
    shift = log_tail - log_sum - log_q_tail  # NaN where all V tokens are kept, and all are overwritten
    return (log_q + shift[:, None]).scatter(-1, teacher.ids, kept - log_sum[:, None])
