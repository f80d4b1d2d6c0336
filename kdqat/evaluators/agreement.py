"""Perplexity and agreement with the teacher, from one pass over a text.

KL to the teacher is the first judge of a student: cross-entropy training lowers in-domain perplexity and leaves the
teacher all the same. Perplexity follows the papers: exp of the mean negative log-likelihood over all windows, each of
which predicts its own tokens 2 ... seq_len (methods: 2404.14047, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.evaluators.base import TextEvaluator, answer_of
from kdqat.metrics import perplexity, token_kl, token_nll, top1_agreement
from kdqat.models import Teacher
from kdqat.models.split import NO_HEAD
from kdqat.student import Student
from kdqat.types import Outputs

CHUNK_TOKENS = 1024


class Perplexity(TextEvaluator):
    """{"perplexity", "tokens"}; with a teacher also {"teacher_perplexity"}."""

    @torch.no_grad()
    def evaluate(self, student: Student, teacher: Teacher | None) -> dict[str, float]:
        _require_head(self, student)
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        tokens = 0
        for batch in self.batches(student):
            labels = batch.input_ids[:, 1:].reshape(-1)
            tokens += labels.numel()
            ours += _nll(student.split(batch), labels)
            if teacher is not None:
                theirs += _nll(answer_of(teacher, batch), labels)
        numbers = {"perplexity": perplexity(_total(ours), tokens), "tokens": float(tokens)}
        if teacher is not None:
            numbers["teacher_perplexity"] = perplexity(_total(theirs), tokens)
        return numbers


class TeacherAgreement(TextEvaluator):
    """{"kl_mean", "kl_p95", "top1", "perplexity", "teacher_perplexity", "tokens"}.

    kl_mean and kl_p95: mean and 95th percentile over tokens of KL(teacher || student) in nats; top1: share of tokens
    where both rank the same token first.
    """

    @torch.no_grad()
    def evaluate(self, student: Student, teacher: Teacher | None) -> dict[str, float]:
        _require_head(self, student)
        if teacher is None:
            raise ValueError(f"evaluate {self.label}: TeacherAgreement needs model.teacher; use Perplexity without one")
        kls: list[Tensor] = []
        agree: list[Tensor] = []
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for batch in self.batches(student):
            labels = batch.input_ids[:, 1:].reshape(-1)
            answers = student.split(batch), answer_of(teacher, batch)
            for s_rows, t_rows, target in zip(*map(_rows, answers), labels.split(CHUNK_TOKENS), strict=True):
                s_logits, t_logits = answers[0].head(s_rows).float(), answers[1].head(t_rows).float()
                kls.append(token_kl(t_logits, s_logits))
                agree.append(top1_agreement(t_logits, s_logits).sum())
                ours.append(token_nll(s_logits, target).sum())
                theirs.append(token_nll(t_logits, target).sum())
        kl = torch.cat(kls).cpu()
        return {
            "kl_mean": float(kl.double().mean()),
            "kl_p95": float(kl.kthvalue(max(1, round(0.95 * len(kl)))).values),
            "top1": _total(agree) / len(kl),
            "perplexity": perplexity(_total(ours), len(kl)),
            "teacher_perplexity": perplexity(_total(theirs), len(kl)),
            "tokens": float(len(kl)),
        }


def _require_head(evaluator: TextEvaluator, student: Student) -> None:
    """Said before a text is tokenized: an encoder's tokenizer often lacks the EOS that windows are packed with."""
    if not student.split.has_head:
        raise ValueError(f"evaluate {evaluator.label}: {type(evaluator).__name__} needs logits, but {NO_HEAD}")


def _rows(answer: Outputs) -> tuple[Tensor, ...]:
    """The hidden states that predict a next token, as chunks of [N, H]."""
    return answer.hidden[:, :-1].flatten(0, 1).split(CHUNK_TOKENS)


def _nll(answer: Outputs, labels: Tensor) -> list[Tensor]:
    """Summed negative log-likelihood of each chunk."""
    chunks = zip(_rows(answer), labels.split(CHUNK_TOKENS), strict=True)
    return [token_nll(answer.head(rows).float(), target).sum() for rows, target in chunks]


def _total(sums: list[Tensor]) -> float:
    """Sum of 0-D tensors in fp64; they stay on the device until here, where the host waits for them once."""
    return float(torch.stack(sums).double().sum())
