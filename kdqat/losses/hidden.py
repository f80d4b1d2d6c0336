"""Hidden states of student and teacher, layer by layer: mean squared error or cosine distance.

A quantized student has its teacher's shape, so no projection stands between them as in TinyBERT
(https://arxiv.org/abs/1909.10351, eq. 8: MSE). Cosine ignores the norm, which a few outlier channels of a language
model dominate; TernaryLLM (https://arxiv.org/abs/2406.07177) is reported to distil features by cosine
[secondary source].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kdqat.losses.base import DistillLoss, check_layers, extra, paired_layers
from kdqat.losses.select import Reduction, rows_at, target_positions
from kdqat.types import Batch, LossParts, Outputs, TopKOutputs

Distance = Literal["mse", "cosine"]


class HiddenStates(DistillLoss):
    """Per token: the distance between hidden states, averaged over the chosen layers.

    The tokens are the positions that predict a target, as in all losses.

    Args:
        kind: "mse": the squared difference averaged over H. "cosine": 1 - cosine similarity.
        layers: indices into `extras["hidden_states"]`, negative from the end; None: all. Models usually put the
            embedding's output at 0.
        reduction: see `DistillLoss`.

    Raises:
        ValueError: for an unknown kind or an empty list of layers; in `forward` for models of different depth or
            width, a layer that does not exist, or missing hidden states.
    """

    wants = frozenset({"hidden_states"})

    def __init__(
        self, kind: Distance = "mse", *, layers: list[int] | None = None, reduction: Reduction = "token_mean"
    ) -> None:
        super().__init__(reduction=reduction)
        if kind not in get_args(Distance):
            raise ValueError(f"kind {kind!r} is unknown: use {' or '.join(get_args(Distance))}")
        check_layers(layers)
        self.kind = kind
        self.layers = layers

    def forward(self, student: Outputs, teacher: Outputs | TopKOutputs | None, batch: Batch) -> LossParts:
        """The summed distance; `by_name` has "hidden_states"."""
        self.check_teacher(teacher)
        assert teacher is not None
        positions = target_positions(batch)
        pairs = paired_layers(extra(student, "hidden_states", self), extra(teacher, "hidden_states", self), self.layers)
        distances = [
            self._distance(rows_at(ours, positions, batch), rows_at(theirs, positions, batch)).sum()
            for ours, theirs in pairs
        ]
        total = torch.stack(distances).mean()
        return LossParts(total, self.num_targets(batch), {self.name: total.detach()})

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:  # [N, H], [N, H] -> [N]
        dtype = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(dtype), teacher.to(dtype)
        if self.kind == "mse":
            return (student - teacher).square().mean(-1)
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
