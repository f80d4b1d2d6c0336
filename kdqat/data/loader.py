"""Micro-batches in an order that can be repeated and resumed to the batch.

The training batches are one endless sequence: epoch after epoch, each a permutation drawn from (seed, epoch) and from
nothing else. A pass over the loader hands out the next `len(loader)` of them, from wherever the last pass stopped; so
the loader's whole state is how many it has handed out, which `TextData` keeps in the trainer's checkpoints.
Lightning's own count of epochs is not asked: resumed from a checkpoint of an epoch's end with max_steps set, it is off
by one (2.6), and data would be seen twice or never.

Ranks share the permutation: of every `world_size` consecutive batches, rank r takes the r-th. Two ranks therefore
see, step for step, what one rank sees that accumulates two micro-batches. No DistributedSampler is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdqat.data.blocks import Rows
from kdqat.types import Batch


class BlockLoader:
    """Batches of `rows` for one rank.

    In training, rows are permuted anew each epoch and every batch is full: what fills no group of `world_size`
    batches is left out, other rows in each epoch. In validation every pass begins at the first row, rows keep their
    order, the last batch may be smaller, and only the last `len(rows) % world_size` rows are left out.

    Args:
        rows: what to serve.
        batch_size: rows in a batch.
        training: permuted and full, or in order and whole.
        seed: of the permutation.
        rank: this process among `world_size` that share the rows.
        world_size: number of those processes; each gets the same number of batches.

    Raises:
        ValueError: if not every rank gets a batch.
    """

    def __init__(
        self, rows: Rows, *, batch_size: int, training: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_handed_out = 0  # on this rank, and so on every one
        if len(self) == 0:
            need = world_size * (batch_size if training else 1)
            raise ValueError(
                f"{len(rows)} rows make no batch for every process: batch_size={batch_size} on {world_size} "
                f"process(es) needs {need}; lower batch_size or seq_len, or give more text"
            )

    def __len__(self) -> int:
        """Batches of one epoch on one rank."""
        if self.training:
            return len(self.rows) // (self.batch_size * self.world_size)
        return -(-(len(self.rows) // self.world_size) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is asked for. Lightning makes iterators it never uses.
        if not self.training:
            self.num_handed_out = 0
        drawn: tuple[int, list[Tensor]] | None = None  # the epoch, and its batches
        for _ in range(len(self)):
            epoch, index = divmod(self.num_handed_out, len(self))
            if drawn is None or drawn[0] != epoch:
                drawn = epoch, self.batch_rows(epoch)
            self.num_handed_out += 1
            yield self.rows.batch(drawn[1][index])

    def batch_rows(self, epoch: int) -> list[Tensor]:
        """The row numbers [B] of each batch of an epoch, for this rank."""
        num_rows = len(self.rows)
        if not self.training:
            mine = torch.arange(num_rows)[self.rank :: self.world_size][: num_rows // self.world_size]
            return list(mine.split(self.batch_size))
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(num_rows))
        whole = order[: len(self) * self.world_size * self.batch_size]
        return list(whole.view(-1, self.world_size, self.batch_size)[:, self.rank])

    def state_dict(self) -> dict[str, int]:
        """Plain numbers: how many batches were handed out, and of which order."""
        return {"num_handed_out": self.num_handed_out, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that `state` counts.

        Raises:
            ValueError: if the order was made from other rows, batches, seeds or numbers of processes.
        """
        check_same_order(state, self._order())
        self.num_handed_out = state["num_handed_out"]

    def _order(self) -> dict[str, int]:
        return {
            "rows": len(self.rows),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "world_size": self.world_size,
        }


def check_same_order(state: dict[str, Any], order: dict[str, int]) -> None:
    """Refuse a state that counts batches of another order than `order`.

    Raises:
        ValueError: naming what differs.
    """
    if changed := [f"{key} {state.get(key)} -> {value}" for key, value in order.items() if state.get(key) != value]:
        raise ValueError(
            f"the checkpoint counts batches of other data ({', '.join(changed)}): resume with the data arguments "
            "and the number of processes it was written with, or start a new run"
        )
