"""Agreement of sentence embeddings: what a quantized encoder is judged by, having no logits.

An embedding is the mean of the last hidden states over a sentence's tokens, scaled to length 1 (Sentence-BERT,
1908.10084). That each stays near the teacher's says that vectors of both may share an index; a search needs less: that
the student ranks pairs of sentences as the teacher does, which is Spearman's correlation of their similarities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdqat.data import TextSource
from kdqat.data.sentences import padded, read_sentences
from kdqat.evaluators.base import Evaluator, answer_of, device_of, require_positions, text_name, tracked
from kdqat.models import Teacher
from kdqat.student import Student
from kdqat.types import Batch, Outputs

MAX_PAIRS = 100_000


class EmbeddingAgreement(Evaluator):
    """{"cosine_mean", "cosine_p5", "similarity_spearman", "sentences"}.

    cosine_mean and cosine_p5: mean and 5th percentile over sentences of the cosine between the student's and the
    teacher's embedding; similarity_spearman: rank correlation of the student's and the teacher's cosine similarities
    over all pairs of sentences, or over a fixed sample of 100,000 of them; sentences: how many, each counted once.

    Args:
        text: a file with a sentence per line, "kdqat:prose", "python_docs:heldout" or a TextSource, whose rows are
            sentences; see data/sentences.py.
        label: default: the text's own name.
        seq_len: tokens of a sentence; what is longer is cut.
        limit: at most so many sentences, from the start; None: all.
        batch_size: sentences fed at once, padded to the longest of them.
    """

    def __init__(
        self,
        text: str | TextSource | list[str | TextSource] = "kdqat:prose",
        *,
        label: str | None = None,
        seq_len: int = 256,
        limit: int | None = None,
        batch_size: int = 32,
    ) -> None:
        if seq_len < 2 or batch_size < 1 or (limit is not None and limit < 3):
            raise ValueError("EmbeddingAgreement needs seq_len >= 2, batch_size >= 1 and limit >= 3")
        self.text, self.seq_len, self.limit, self.batch_size = text, seq_len, limit, batch_size
        self.label = label or text_name(text)

    @torch.no_grad()
    def evaluate(self, student: Student, teacher: Teacher | None) -> dict[str, float]:
        if teacher is None:
            raise ValueError(f"evaluate {self.label}: EmbeddingAgreement compares with model.teacher; name one")
        require_positions(self.label, self.seq_len, student)
        ours, theirs = self._embeddings(student, student.split, partial(answer_of, teacher))
        if ours.shape[-1] != theirs.shape[-1]:
            raise ValueError(
                f"evaluate {self.label}: the teacher's embeddings have {theirs.shape[-1]} numbers, the student's "
                f"{ours.shape[-1]}; use a teacher of the student's width"
            )
        cosine = (ours * theirs).sum(-1)
        first, second = _pairs(len(ours))
        similarities = [(side[first] * side[second]).sum(-1) for side in (ours, theirs)]
        return {
            "cosine_mean": float(cosine.mean()),
            "cosine_p5": float(cosine.kthvalue(max(1, round(0.05 * len(cosine)))).values),
            "similarity_spearman": spearman(*similarities),
            "sentences": float(len(cosine)),
        }

    def _embeddings(self, student: Student, *models: Callable[[Batch], Outputs]) -> list[Tensor]:
        """Every model's embeddings of the sentences, each [N, H] in float64 on the CPU."""
        sentences = read_sentences(self.text, limit=self.limit)
        encoded = student.tokenizer(sentences, truncation=True, max_length=self.seq_len).input_ids
        rows = sorted((ids for ids in encoded if ids), key=len)  # sorted: little is padded
        if len(rows) < 3:
            raise ValueError(f"evaluate {self.label}: holds {len(rows)} different sentences; at least 3 are needed")
        device = device_of(student.split)
        found: list[list[Tensor]] = [[] for _ in models]
        for start in tracked(range(0, len(rows), self.batch_size), self.label):
            ids, mask = padded(rows[start : start + self.batch_size], student.tokenizer.pad_token_id or 0)
            ids, mask = ids.to(device), mask.to(device)
            for model, parts in zip(models, found, strict=True):
                parts.append(mean_pooled(model(Batch(ids, ids, attention_mask=mask)).hidden, mask))
        return [torch.cat(parts).cpu().double() for parts in found]


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of `hidden` [B, T, H] over the tokens where `attention_mask` [B, T] is 1, L2-normalized, [B, H] fp32."""
    mask = attention_mask.unsqueeze(-1).float()
    return F.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of `a` and `b`, both [N]; equal values share their mean rank.

    nan if all values of one side are equal: it has no order to agree with.
    """
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    return float((x @ y) / (x.norm() * y.norm()))


def _ranks(values: Tensor) -> Tensor:
    """Rank of every value [N], from 0, float64; ties get the mean of the ranks that they take up."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    return (last.double() - (counts - 1).double() / 2)[place]


def _pairs(num: int) -> tuple[Tensor, Tensor]:
    """Indices of all pairs i < j of `num` things; of more than MAX_PAIRS so many random ones, always the same."""
    if num * (num - 1) // 2 <= MAX_PAIRS:
        first, second = torch.triu_indices(num, num, offset=1)
        return first, second
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(num, (MAX_PAIRS,), generator=generator)
    return first, (first + torch.randint(1, num, (MAX_PAIRS,), generator=generator)) % num
