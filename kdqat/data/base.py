"""What every text data module has in common: arguments, held-out rows, loaders.

A data module is built from a recipe before any tokenizer exists; `bind` hands it the student's and only then are
files read. There is no `tokenizer` argument: a student can be trained on its own token ids only.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

import lightning as L

from kdqat.data.blocks import Rows
from kdqat.data.loader import BlockLoader
from kdqat.data.stream import StreamLoader

log = logging.getLogger(__name__)


class TextData(L.LightningDataModule, ABC):
    """Rows of tokens for training and validation. A leaf writes `make_rows`.

    Args:
        seq_len: tokens in a row.
        batch_size: rows in a micro-batch, on each device.
        shuffle_seed: of the order of the training rows; the model's seed leaves the order alone.
        val_rows: rows held out for validation; 0: none. The last ones of the corpus, taken before shuffling, or the
            first ones of the leaf's own validation text.

    Raises:
        ValueError: for a number that is out of range.
    """

    def __init__(self, *, seq_len: int = 1024, batch_size: int = 4, shuffle_seed: int = 0, val_rows: int = 16) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 2),  # one token to read, one to predict
            ("batch_size", batch_size, 1),
            ("shuffle_seed", shuffle_seed, 0),
            ("val_rows", val_rows, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.val_rows = val_rows
        self._tokenizer: Any = None
        self._train: Rows | None = None
        self._val: Rows | None = None
        self._loader: BlockLoader | StreamLoader | None = None
        self._resume_from: dict[str, Any] | None = None
        self._facts: dict[str, int] = {}

    @abstractmethod
    def make_rows(self, tokenizer: Any) -> tuple[Rows | None, Rows | None, dict[str, int]]:
        """Training rows (None: streamed), validation rows (None: no validation), and counts for `describe`."""

    def bind(self, tokenizer: Any, max_positions: int | None = None) -> None:
        """Read, tokenize and pack everything; a second call with the same tokenizer does nothing.

        Args:
            tokenizer: the student's.
            max_positions: the longest row the model takes; None: not limited.

        Raises:
            ValueError: if rows are longer than that, or the text cannot be read or is too short.
        """
        if max_positions is not None and self.seq_len > max_positions:
            raise ValueError(
                f"seq_len={self.seq_len} is longer than the model's {max_positions} positions: "
                f"use seq_len <= {max_positions}"
            )
        if self._tokenizer is tokenizer:
            return
        self._train, self._val, self._facts = self.make_rows(tokenizer)
        self._tokenizer = tokenizer
        log.info("data: %s", ", ".join(f"{key} {value}" for key, value in self.describe().items()))

    def describe(self) -> dict[str, int]:
        """Counts to print: rows for training and validation, and what the leaf counted. Needs `bind`."""
        self._require_bound()
        rows = {} if self._train is None else {"train_rows": len(self._train)}
        return {**rows, "val_rows": 0 if self._val is None else len(self._val), **self._facts}

    def all_rows(self) -> list[Rows]:
        """Training rows, then validation rows if there are any: everything a run can ask a teacher. Needs `bind`.

        Raises:
            ValueError: for streamed text, whose rows nobody knows beforehand.
        """
        self._require_bound()
        if self._train is None:
            raise ValueError(
                "data: streamed rows are not known before they come, so no teacher's answers to them can be cached: "
                "set streaming: false (and a limit), or use a FrozenTeacher"
            )
        return [self._train] if self._val is None else [self._train, self._val]

    def row_keys(self) -> list[bytes]:
        """The keys of `all_rows`, in order; errors likewise."""
        return [key for rows in self.all_rows() for key in rows.row_keys()]

    def train_dataloader(self) -> BlockLoader | StreamLoader:
        """Micro-batches of this process, shuffled by (shuffle_seed, epoch)."""
        self._require_bound()
        if self.trainer is not None and getattr(self.trainer, "reload_dataloaders_every_n_epochs", False):
            raise ValueError(
                "reload_dataloaders_every_n_epochs would begin the order of the data again with every reload: "
                "leave it at 0"
            )
        self._loader = self.make_train_loader()
        if self._resume_from is not None:
            self._loader.load_state_dict(self._resume_from)
            self._resume_from = None
        return self._loader

    def make_train_loader(self) -> BlockLoader | StreamLoader:
        """A loader at the beginning of the training rows; a leaf that streams makes its own."""
        assert self._train is not None
        return BlockLoader(
            self._train, batch_size=self.batch_size, training=True, seed=self.shuffle_seed, **self.rank_and_world()
        )

    def val_dataloader(self) -> BlockLoader | list[BlockLoader]:
        """Micro-batches of this process in the order of the text; an empty list without validation."""
        self._require_bound()
        if self._val is None:
            return []
        return BlockLoader(self._val, batch_size=self.batch_size, training=False, **self.rank_and_world())

    def state_dict(self) -> dict[str, Any]:
        """How far training came in the data, for the checkpoint.

        Lightning stores a loader's state as well, but does not give it back where an epoch had just ended.
        """
        return {} if self._loader is None else {"train_loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next `train_dataloader` goes on where `state_dict` stopped."""
        self._resume_from = state_dict.get("train_loader")

    def rank_and_world(self) -> dict[str, int]:
        """Which of the processes that share the data this one is.

        The strategy is asked, not the trainer: under tensor parallelism several processes work on the same rows.
        """
        shared = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"rank": shared["rank"], "world_size": shared["num_replicas"]} if shared else {}

    def hold_out(self, rows: Rows) -> tuple[Rows, Rows | None]:
        """The last `val_rows` rows for validation, the others for training.

        Raises:
            ValueError: if nothing is left to train on.
        """
        if self.val_rows == 0:
            return rows, None
        if len(rows) <= self.val_rows:
            raise ValueError(
                f"the text makes {len(rows)} rows of seq_len={self.seq_len}, and val_rows={self.val_rows} of them "
                "are held out: lower val_rows or seq_len, or give more text"
            )
        return rows[: -self.val_rows], rows[-self.val_rows :]

    def _require_bound(self) -> None:
        if self._tokenizer is None:
            raise ValueError("the data has no tokenizer yet: call bind(tokenizer, max_positions) first")
