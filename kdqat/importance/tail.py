"""A model from one of its blocks on: what comes before is known and not computed again.

Blocks before it are stepped over by a forward of one line, so that masks, rotary tables and the final norm stay the
model's own, whatever its family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdqat.calibrate.capture import on_device
from kdqat.metrics import token_kl
from kdqat.models import SplitModel, blocks_of
from kdqat.types import Batch

CHUNK_TOKENS = 1024  # logits are [tokens, V]: never of a whole micro-batch


class Tail:
    """`split` computed from any block on, without a graph."""

    def __init__(self, split: SplitModel) -> None:
        self.split, self._blocks = split, blocks_of(split.model)
        self._tuples = False  # some families' blocks answer with tuples; the first full pass tells

    @torch.no_grad()
    def whole(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm [B, T, H], all blocks computed."""

        def note(module: Any, args: Any, answer: Any) -> None:
            self._tuples = isinstance(answer, tuple)

        hook = self._blocks[0].register_forward_hook(note)
        try:
            return self.split(on_device(batch, self.split)).hidden
        finally:
            hook.remove()

    @torch.no_grad()
    def from_block(self, index: int, hidden: Tensor, batch: Batch) -> Tensor:
        """The same where block `index` gets `hidden` [B, T, H]; len(blocks) leaves the final norm only."""
        skipped: Sequence[Any] = self._blocks[:index]
        answer = (hidden,) if self._tuples else hidden
        try:
            for block in skipped:
                block.forward = lambda *args, **kwargs: answer
            return self.split(on_device(batch, self.split)).hidden
        finally:
            for block in skipped:
                del block.forward  # what the class defines shows again


@torch.no_grad()
def sum_kl(split: SplitModel, reference: Tensor, hidden: Tensor, mask: Tensor) -> tuple[float, int]:
    """(sum of KL[reference; hidden] over the tokens that predict another one, how many they are).

    Args:
        reference, hidden: [B, T, H] after the final norm, of the same head.
        mask: [B, T] bool, True where there is a token.
    """
    here = (mask[:, :-1] & mask[:, 1:]).flatten().to(hidden.device)
    theirs, ours = (states[:, :-1].flatten(0, 1)[here] for states in (reference.to(hidden.device), hidden))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for t_rows, s_rows in zip(theirs.split(CHUNK_TOKENS), ours.split(CHUNK_TOKENS), strict=True):
        total += token_kl(split.head(t_rows), split.head(s_rows)).double().sum()
    return float(total), len(ours)
