"""Micro-batches of a text too big for memory: read, tokenized and packed on the fly.

Rows pass through a buffer that hands out a random one for each that comes in; (seed, round) decides the draws, a round
being one reading of the whole text. After the last round comes the next, so the batches are one endless sequence as in
`loader`. A resumed run reads the round again from its beginning and skips what was handed out: exact, and it costs the
tokenizing.

The loader has a length, of the user's choice, though the text has none that is known: for a loader without one,
Lightning fetches a batch ahead, and its checkpoints would count a batch that was not trained on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from kdqat.data.blocks import stack_rows
from kdqat.data.loader import check_same_order
from kdqat.types import Batch

log = logging.getLogger(__name__)


class StreamLoader:
    """Batches of a stream of rows for one rank.

    Args:
        read_rows: starts a new round over the rows of a `RowPacker`.
        batch_size: rows in a batch.
        num_batches: batches of a pass over this loader, Lightning's epoch. The next pass goes on where it stopped.
        buffer_rows: rows among which the next one is drawn.
        seed: of the draws.
        rank: this process among `world_size`; each reads everything and takes every `world_size`-th batch.
        world_size: number of those processes.
    """

    def __init__(
        self,
        read_rows: Callable[[], Iterator[np.ndarray]],
        *,
        batch_size: int,
        num_batches: int,
        buffer_rows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.read_rows = read_rows
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.buffer_rows = buffer_rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.round = 0
        self.position = 0  # batches of this round handed out, on this rank and so on every one
        self._batches: Iterator[Batch] | None = None  # kept between passes: the text is not read again for each

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.num_batches):
            if self._batches is None:
                self._batches = self._endless()
            yield next(self._batches)

    def _endless(self) -> Iterator[Batch]:
        if self.position:
            log.info("resuming the stream: reading past the first %d batches of round %d", self.position, self.round)
        while True:
            yield from self._one_round(self.round, self.position)
            if self.position == 0:
                need = self.batch_size * self.world_size
                raise ValueError(
                    f"the stream ended before every process had a batch: batch_size={self.batch_size} on "
                    f"{self.world_size} process(es) needs {need} rows; lower batch_size or seq_len, or give more text"
                )
            self.round, self.position = self.round + 1, 0

    def _one_round(self, round_: int, start: int) -> Iterator[Batch]:
        group_size = self.batch_size * self.world_size
        rows = self._shuffled(round_)
        for number in itertools.count():
            group = list(itertools.islice(rows, group_size))
            if len(group) < group_size:
                return
            if number >= start:
                mine = stack_rows(group[self.rank * self.batch_size :][: self.batch_size])
                self.position = number + 1
                yield mine.batch(torch.arange(self.batch_size))

    def _shuffled(self, round_: int) -> Iterator[np.ndarray]:
        draw = np.random.default_rng([self.seed, round_])
        buffer: list[np.ndarray] = []
        for row in self.read_rows():
            if len(buffer) < self.buffer_rows:
                buffer.append(row)
                continue
            index = int(draw.integers(len(buffer)))
            yield buffer[index]
            buffer[index] = row
        for index in draw.permutation(len(buffer)):
            yield buffer[index]

    def state_dict(self) -> dict[str, int]:
        """Plain numbers: the round, the batches of it that were handed out, and of which order."""
        return {"round": self.round, "position": self.position, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that `state` counts.

        Raises:
            ValueError: if the order was made from other batches, buffers, seeds or numbers of processes.
        """
        check_same_order(state, self._order())
        self.round, self.position, self._batches = state["round"], state["position"], None

    def _order(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "buffer_rows": self.buffer_rows,
            "seed": self.seed,
            "world_size": self.world_size,
        }
