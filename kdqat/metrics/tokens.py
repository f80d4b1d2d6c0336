"""How far two models' next-token distributions are apart, token by token: KL, negative log-likelihood, agreement.

Evaluators, logs and losses share these functions, so that the KL in a table is the KL that was trained on. All
are computed in fp32 whatever the logits are (float64 stays float64): a bf16 softmax over 100k tokens has errors
as large as the KL of a good student. p is the teacher's distribution, q the student's;
KL[a; b] = sum_v a_v log(a_v / b_v).

Letters in shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdqat.types import IGNORE_INDEX


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of `logits` [..., V] at `temperature`, [..., V], fp32 (float64 for float64 logits).

    A logit of -inf (a token a model forbids) becomes the lowest finite number, so that 0 * log 0 is 0 and not NaN.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature  # upcast first: a bf16 division rounds the logits again
    # dtype= casts inside the kernel: no fp32 copy of the logits beside the result, nor a second result without a graph
    result = F.log_softmax(logits, dim=-1, dtype=dtype)
    lowest = torch.finfo(dtype).min
    return result.clamp_min(lowest) if result.requires_grad else result.clamp_min_(lowest)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL[p; q] in nats between log-probabilities [..., V] as `log_probs` makes them, [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL[p; q] of each token in nats: [N, V] and [N, V] -> [N]. What "KL to the teacher" means everywhere in kdqat.

    Raises:
        ValueError: if the two vocabularies differ in size.
    """
    check_same_vocabulary(teacher_logits, student_logits)
    return kl_divergence(log_probs(teacher_logits), log_probs(student_logits))


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of `labels` [N] under `logits` [N, V] in nats, [N].

    `logits[i]` must already be the prediction of `labels[i]` (no shift here); IGNORE_INDEX gives 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, ignore_index=IGNORE_INDEX, reduction="none")


def top1_agreement(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Whether both models put the same token first: [N, V] and [N, V] -> [N] bool. Equal logits: the lower index.

    Raises:
        ValueError: if the two vocabularies differ in size.
    """
    check_same_vocabulary(teacher_logits, student_logits)
    return teacher_logits.argmax(-1) == student_logits.argmax(-1)


def token_confidence(logits: Tensor) -> Tensor:
    """Probability of the likeliest token, [N, V] -> [N]."""
    return log_probs(logits).amax(-1).exp()


def check_same_vocabulary(teacher_logits: Tensor, student_logits: Tensor) -> None:
    """Refuse to compare distributions over different vocabularies.

    Raises:
        ValueError: naming both sizes.
    """
    teacher_size, student_size = teacher_logits.shape[-1], student_logits.shape[-1]
    if teacher_size != student_size:
        raise ValueError(
            f"the teacher's vocabulary has {teacher_size} entries, the student's {student_size}: use a teacher with "
            "the student's tokenizer, and cut rows that only pad its head before the logits are compared"
        )
