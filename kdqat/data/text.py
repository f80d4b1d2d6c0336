"""Plain text for language modelling: documents packed into rows, in memory or streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdqat.data.base import TextData
from kdqat.data.blocks import RowPacker, Rows, pack_documents, stack_rows, too_few_tokens
from kdqat.data.cache import Packed, cached, texts_fingerprint
from kdqat.data.loader import BlockLoader
from kdqat.data.stream import StreamLoader
from kdqat.data.texts import Texts, iter_documents
from kdqat.files import tokenizer_fingerprint

_STREAM_DEFAULT = 1000


class PackedText(TextData):
    """Rows of `seq_len` tokens cut from documents laid end to end; every token is a label.

    Args:
        text: what to train on; see `kdqat.data.texts`.
        val_text: what to validate on: its first `val_rows` rows, or fewer if it is shorter. None: the last
            `val_rows` rows of `text` (streaming: the first ones).
        document_mask: documents in a row do not see each other: batches carry segment_ids and position_ids.
        streaming: read and tokenize on the fly, for text that does not fit into memory.
        batches_per_epoch: streaming only: micro-batches of what the trainer calls an epoch, as a stream does not
            know its length. The next epoch goes on in the text, which starts again at its end. None: 1000.
        buffer_rows: streaming only: rows among which the next one is drawn; None: 1000.
        limit: read at most this many documents of `text`; None: all.
        seq_len, batch_size, shuffle_seed, val_rows: see `TextData`.

    Raises:
        ValueError: for a number out of range, or a streaming option without streaming.
    """

    def __init__(
        self,
        text: Texts,
        *,
        val_text: Texts | None = None,
        document_mask: bool = False,
        streaming: bool = False,
        batches_per_epoch: int | None = None,
        buffer_rows: int | None = None,
        limit: int | None = None,
        seq_len: int = 1024,
        batch_size: int = 4,
        shuffle_seed: int = 0,
        val_rows: int = 16,
    ) -> None:
        super().__init__(seq_len=seq_len, batch_size=batch_size, shuffle_seed=shuffle_seed, val_rows=val_rows)
        options = {"batches_per_epoch": batches_per_epoch, "buffer_rows": buffer_rows}
        if not streaming and (useless := [name for name, value in options.items() if value is not None]):
            raise ValueError(f"{' and '.join(useless)}: for streaming=True only; without it, all rows are in memory")
        for name, value in (*options.items(), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.text = text
        self.val_text = val_text
        self.document_mask = document_mask
        self.streaming = streaming
        self.batches_per_epoch = _STREAM_DEFAULT if batches_per_epoch is None else batches_per_epoch
        self.buffer_rows = _STREAM_DEFAULT if buffer_rows is None else buffer_rows
        self.limit = limit

    def make_rows(self, tokenizer: Any) -> tuple[Rows | None, Rows | None, dict[str, int]]:
        """See `TextData.make_rows`."""
        val = None
        if self.val_text is not None and self.val_rows:
            val = self._pack(self.val_text, tokenizer, limit=None)[0][: self.val_rows]
        if self.streaming:
            if val is None and self.val_rows:
                val = self._first_rows(tokenizer)
            return None, val, {}
        train, facts = self._pack(self.text, tokenizer, limit=self.limit)
        if val is None:
            train, val = self.hold_out(train)
        return train, val, facts

    def make_train_loader(self) -> BlockLoader | StreamLoader:
        """See `TextData.make_train_loader`; streaming: a loader of `batches_per_epoch`."""
        if not self.streaming:
            return super().make_train_loader()
        return StreamLoader(
            self._stream_train_rows,
            batch_size=self.batch_size,
            num_batches=self.batches_per_epoch,
            buffer_rows=self.buffer_rows,
            seed=self.shuffle_seed,
            **self.rank_and_world(),
        )

    def _pack(self, text: Texts, tokenizer: Any, limit: int | None) -> Packed:
        key = None
        if (tokens_of := tokenizer_fingerprint(tokenizer)) is not None:
            key = {
                "kind": "packed",
                "texts": texts_fingerprint(text),
                "tokenizer": tokens_of,
                "limit": limit,
                "seq_len": self.seq_len,
                "document_mask": self.document_mask,
            }
        return cached(
            key,
            lambda: pack_documents(
                iter_documents(text, limit=limit), tokenizer, self.seq_len, document_mask=self.document_mask
            ),
        )

    def _stream_rows(self, tokenizer: Any) -> Iterator[np.ndarray]:
        packer = RowPacker(tokenizer, self.seq_len, document_mask=self.document_mask)
        return packer.rows(iter_documents(self.text, stream=True, limit=self.limit))

    def _stream_train_rows(self) -> Iterator[np.ndarray]:
        """The stream without the rows that `_first_rows` held out of it."""
        held_out = self.val_rows if self.val_text is None else 0
        return itertools.islice(self._stream_rows(self._tokenizer), held_out, None)

    def _first_rows(self, tokenizer: Any) -> Rows:
        rows = list(itertools.islice(self._stream_rows(tokenizer), self.val_rows))
        if len(rows) < self.val_rows:
            raise ValueError(
                f"{too_few_tokens(len(rows) * self.seq_len, self.seq_len)}"
                if not rows
                else f"the stream has {len(rows)} rows, fewer than val_rows={self.val_rows}: lower val_rows or seq_len"
            )
        return stack_rows(rows)
