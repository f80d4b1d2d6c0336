"""Cross-entropy of a language model, row by row, with a graph to chosen weights: what Fisher and Hessian need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from kdqat.calibrate.capture import on_device, token_mask
from kdqat.metrics import token_nll
from kdqat.models import SplitModel
from kdqat.types import IGNORE_INDEX, Batch


def rows_of(batches: Iterable[Batch]) -> list[Batch]:
    """Micro-batches of one row each, cut to their tokens: padding is gone."""
    rows = []
    for batch in batches:
        for i, mask in enumerate(token_mask(batch)):
            ids = batch.input_ids[i : i + 1, mask.to(batch.input_ids.device)]
            if ids.shape[1] > 1:
                rows.append(Batch(ids, ids))
    return rows


def row_loss(split: SplitModel, row: Batch) -> tuple[Tensor, int]:
    """(mean cross-entropy of a row's next tokens, their number)."""
    row = on_device(row, split)
    logits = split.head(split(row).hidden[0, :-1])
    labels = row.labels[0, 1:]
    num = int((labels != IGNORE_INDEX).sum())
    return token_nll(logits, labels).sum() / num, num


@contextmanager
def differentiable(model: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients go to `chosen` and to nothing else inside the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def require_language_model(who: str, split: SplitModel) -> None:
    """
    Raises:
        ValueError: for an encoder: it predicts no next token.
    """
    if not split.has_head or not split.family.causal:
        raise ValueError(f"score: {who} needs a causal language model; score an encoder with LIM, ZD or WeightSQNR")
