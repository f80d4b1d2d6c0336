"""Measures of how good a student is, as pure functions: evaluators, losses, logs and the parity gate share them.

Nothing here has state, divides by a batch or synchronises the device; whoever accumulates does that.
"""

from kdqat.metrics.perplexity import perplexity
from kdqat.metrics.signal import sqnr_db
from kdqat.metrics.tokens import (
    check_same_vocabulary,
    kl_divergence,
    log_probs,
    token_confidence,
    token_kl,
    token_nll,
    top1_agreement,
)

__all__ = [
    "check_same_vocabulary",
    "kl_divergence",
    "log_probs",
    "perplexity",
    "sqnr_db",
    "token_confidence",
    "token_kl",
    "token_nll",
    "top1_agreement",
]
