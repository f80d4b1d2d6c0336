"""LoRA on a fake-quantized layer: a low-rank update s B A that is trained while the latent weight W rests.

    inside    y = Q(W + s B A) x       the update passes the fake quantizer: merging W <- W + s B A changes nothing
    outside   y = Q(W) x + s B (A x)   a branch in full precision beside the quantized weight: it cannot be merged

Inside is L4Q's way (https://arxiv.org/abs/2402.04902), outside QLoRA's (https://arxiv.org/abs/2305.14314). The adapter
is a submodule of the layer and nothing is wrapped or renamed: peft's way to the first would be a parametrization, two
graph breaks a layer. peft reads and writes the folders (`models/lora.py`).
"""

from __future__ import annotations

import math
import zlib
from contextlib import nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Placement = Literal["inside", "outside"]


class LoraAdapter(nn.Module):
    """The update s B A of a weight [O, I], s = alpha / rank; fp32, whatever the weight's dtype.

    Args:
        shape: (O, I) of the weight as a matrix.
        rank: of the update.
        alpha: s times the rank.
        placement: inside or outside the fake quantizer.
        dropout: on the input of the branch; outside only.

    Attributes:
        lora_A, lora_B: [r, I] and [O, r]; B is zero, so that a new adapter changes nothing, A waits for `draw`.

    Raises:
        ValueError: for another placement, a rank below 1 or above O or I, or a dropout that cannot be.
    """

    def __init__(
        self,
        shape: torch.Size,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        placement: Placement = "inside",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if placement not in get_args(Placement):
            raise ValueError(f"placement {placement!r} is unknown: use inside or outside")
        if rank < 1:
            raise ValueError(f"rank {rank} is no rank: use 1 or more")
        if rank > min(shape):
            raise ValueError(f"rank {rank} does not fit a weight {tuple(shape)}: use 1 to {min(shape)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is no share: use 0 to below 1")
        if dropout and placement == "inside":
            raise ValueError("dropout acts on the input of a branch, and inside there is none: set dropout: 0")
        self.rank, self.alpha, self.placement, self.dropout = rank, float(alpha), placement, float(dropout)
        self.scaling = self.alpha / rank
        self.lora_A = nn.Parameter(torch.zeros(rank, shape[1], dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank, dtype=torch.float32))

    @property
    def settings(self) -> dict[str, object]:
        """The constructor's arguments but for the shape."""
        return {"rank": self.rank, "alpha": self.alpha, "placement": self.placement, "dropout": self.dropout}

    @torch.no_grad()
    def draw(self, name: str) -> None:
        """Draw A as peft does, uniform within 1 / sqrt(I), from the run's seed and the layer's name.

        No random number of the run is used up, and every rank draws the same.
        """
        if self.lora_A.device.type == "meta":
            return
        generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))

    def added_to(self, matrix: Tensor) -> Tensor:
        """`matrix` [O, I] + s B A, in fp32 and then in the matrix' dtype: what training quantizes and merging keeps."""
        device = matrix.device.type
        exact = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with exact:  # autocast would round the update to bf16
            # one operation, and one that selective checkpointing does not keep: it keeps mm and addmm
            update = (self.lora_B[None], self.lora_A[None])
            return torch.baddbmm(matrix.float()[None], *update, alpha=self.scaling)[0].to(matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The branch s B (A x) of an input [.., I]: [.., O]."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scaling

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items())
