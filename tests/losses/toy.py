"""Toy models for the loss tests: a head with every trick of a real one, and `Outputs` made from token ids.

B batch, T tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdqat.types import IGNORE_INDEX, Batch, Outputs, Projection

VOCABULARY, WIDTH = 11, 5


class Head(nn.Module):
    """An lm_head, optionally biased (Phi), soft-capped (Gemma 2) and cut; remembers how many rows each call got."""

    def __init__(
        self,
        *,
        bias: bool = False,
        cap: float | None = None,
        cut: int | None = None,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, vocabulary, bias=bias)
        self.cap, self.cut = cap, cut
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        return self.transform(self.linear(hidden))

    def transform(self, logits: Tensor) -> Tensor:
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits[..., : self.cut]

    def projection(self) -> Projection:
        return Projection(self.linear.weight, self.linear.bias, self.transform)


class Model(nn.Module):
    """Embeds tokens, mixes them causally by attention, and answers `Outputs`; position t depends on tokens <= t.

    `projects`: whether its outputs say that the head is one matmul.
    """

    projects = False

    def __init__(self, seed: int, *, tied: bool = False, scale: float = 1.0, **head: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = Head(**head)
        if tied:
            self.head.linear.weight = self.embedding.weight
        self.scale = scale
        self.double()

    def outputs(self, batch: Batch) -> Outputs:
        embedded = self.embedding(batch.input_ids)  # [B, T, H]
        T = batch.input_ids.shape[1]
        allowed = torch.ones(T, T, dtype=torch.bool).tril()[None]
        if batch.attention_mask is not None:
            allowed = allowed & batch.attention_mask.bool()[:, None, :]
        sharpness = torch.tensor([0.5, 2.0]).to(embedded).view(1, 2, 1, 1)
        scores = (embedded @ embedded.mT)[:, None] * sharpness  # [B, 2, T, T]
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        attention = scores.softmax(-1)  # a row of NaN for a query that may see nothing, as in eager HF models
        mixed = attention.nan_to_num().mean(1) @ embedded
        hidden = self.scale * (embedded + mixed).tanh()
        extras = {"hidden_states": (embedded, mixed, hidden), "attentions": (attention, (0.3 * scores).softmax(-1))}
        return Outputs(hidden, self.head, extras, self.head.projection if self.projects else None)


def random_batch(rows: int = 3, tokens: int = 6, seed: int = 0) -> Batch:
    """Unpadded, every label its token."""
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids.clone())


def ragged_batch() -> Batch:
    """Rows of 6, 4, 5 and 0 targets out of 7: padding right and left, a prompt without labels, an empty row."""
    batch = random_batch(4, 7, seed=1)
    mask = torch.ones_like(batch.input_ids)
    mask[1, 5:] = 0
    mask[2, :1] = 0
    labels = batch.labels.masked_fill(mask == 0, IGNORE_INDEX)
    labels[3] = IGNORE_INDEX
    return Batch(batch.input_ids, labels, mask)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A micro-batch."""
    return Batch(*(None if field is None else field[rows] for field in batch))


def assert_near(ours: list[Tensor], plain: list[Tensor], tolerance: float) -> None:
    """Each of `ours` is one of `plain` up to `tolerance` times its norm."""
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()
