"""A teacher's answer as its k likeliest tokens: what a cache keeps of a vocabulary.

The head runs chunk by chunk, so that logits [tokens, V] never exist. What lies outside the k is kept as one number, the
log of its probability, taken from the logits outside and not as 1 - sum, which cancels where the tail is small.

Log-probabilities are stored as fp16, which rounds log p by at most 2^-11 of itself: a token's probability changes by at
most p |log p| 2^-11 < 2e-4, and the likeliest tokens, whose log is near 0, by far less. A bf16 teacher's own logits are
known to 2^-9 of themselves only. After reading, the stored distribution is scaled to sum to 1 again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.types import Outputs, TopKOutputs

CHUNK_TOKENS = 1024
_LEAST = -1.0e4  # log p of a token that a model rules out: finite, and its exponential is 0


def ids_dtype(vocabulary: int) -> torch.dtype:
    """The smallest type that tokens are stored in."""
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32


@torch.no_grad()
def top_k_of(answer: Outputs, k: int) -> dict[str, Tensor]:
    """The k likeliest tokens at every position of `answer`: what is stored of them, on its device.

    Returns:
        ids [B, T, k], uint16 or int32; log_probs [B, T, k], fp16, descending; log_tail [B, T], fp32, -inf if k is all.
    """
    parts = [_chunk(answer.head(rows).float(), k) for rows in answer.hidden.flatten(0, 1).split(CHUNK_TOKENS)]
    shape = answer.hidden.shape[:2]
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, shape) for name in parts[0]}


def _chunk(logits: Tensor, k: int) -> dict[str, Tensor]:
    top = logits.topk(k, dim=-1)
    total = logits.logsumexp(-1)
    tail = logits.scatter_(-1, top.indices, -torch.inf).logsumexp(-1) - total  # the logits are ours to change
    log_probs = (top.values - total[:, None]).clamp(min=_LEAST)
    return {
        "ids": top.indices.to(ids_dtype(logits.shape[-1])),
        "log_probs": log_probs.half(),
        "log_tail": tail,
    }


def as_outputs(stored: dict[str, Tensor]) -> TopKOutputs:
    """What was stored, as an answer: int64 ids, and fp32 probabilities that sum to 1 with their tail."""
    log_probs, log_tail = stored["log_probs"].float(), stored["log_tail"]
    total = torch.logaddexp(log_probs.logsumexp(-1), log_tail)
    return TopKOutputs(stored["ids"].long(), log_probs - total[..., None], log_tail - total, {})
