"""Perplexity from summed log-likelihoods: exp of the mean negative log-likelihood per token.

The sum and the count come separately so that batches of unequal length and ranks add up exactly; a mean of
per-batch perplexities would be another, smaller-batch-dependent number.
"""

from __future__ import annotations

import math

from torch import Tensor


def perplexity(total_nll: float | Tensor, num_tokens: int | Tensor) -> float:
    """exp(total_nll / num_tokens), with `total_nll` in nats; inf where that overflows.

    Raises:
        ValueError: if no token was counted.
    """
    if int(num_tokens) <= 0:
        raise ValueError("perplexity needs num_tokens >= 1: the text is empty, or all of its labels are ignored")
    try:
        return math.exp(float(total_nll) / int(num_tokens))
    except OverflowError:
        return math.inf
