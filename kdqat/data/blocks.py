"""Packing: documents become rows of one length, with nothing padded and (but for the end) nothing lost.

Documents are tokenized, each is closed with EOS, all are laid end to end in the order of the corpus, and the stream
is cut every `seq_len` tokens. The remainder is dropped and counted. Rows are shuffled later, documents never: so a
row is always the same row.

Special tokens are decided here, not by a tokenizer's `encode`: documents are encoded without any, and BOS is put in
front of each document for the tokenizers that would have put it there themselves.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdqat.data.keys import row_keys
from kdqat.types import IGNORE_INDEX, Batch

log = logging.getLogger(__name__)

_CHUNK = 256  # documents handed to the tokenizer, or rows to the digests, at once


@dataclass(frozen=True)
class Rows:
    """Rows ready for training. N rows, T tokens; everything is int32, which halves the memory of int64.

    `labels` None: every token is one. `attention_mask` None: nothing is padded. `segment_ids` None: no document mask.
    """

    input_ids: Tensor  # [N, T]
    labels: Tensor | None = None  # [N, T], IGNORE_INDEX where no loss counts
    attention_mask: Tensor | None = None  # [N, T], 1 real, 0 padding
    segment_ids: Tensor | None = None  # [N, T], from 0 in every row

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice | Tensor) -> Rows:
        return Rows(**{name: tensor[index] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    def batch(self, index: Tensor) -> Batch:
        """The rows `index` [B] as a micro-batch of int64.

        With segments, positions restart in each, and a segment's first token is no label: what stands before it
        belongs to another document, which the mask hides. Every row carries its key.
        """
        rows = {name: tensor[index].long() for name, tensor in self.tensors().items()}
        rows.setdefault("labels", rows["input_ids"].clone())
        if self.segment_ids is not None:
            rows["position_ids"] = positions(rows["segment_ids"])
            rows["labels"] = rows["labels"].masked_fill(rows["position_ids"] == 0, IGNORE_INDEX)
        batch = Batch(**rows)  # type: ignore[arg-type]
        return batch._replace(row_keys=row_keys(batch))

    def row_keys(self) -> list[bytes]:
        """The key of every row, in order; see `kdqat.data.keys`."""
        parts = torch.arange(len(self)).split(_CHUNK)
        return [key for part in parts for key in self.batch(part).row_keys or ()]


def positions(segment_ids: Tensor) -> Tensor:
    """[B, T] segment numbers -> [B, T] positions that restart from 0 with every segment."""
    index = torch.arange(segment_ids.shape[1]).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins every text with BOS (Llama's does; that of GPT-2 does not)."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]


def iter_tokens(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Each document as [BOS] tokens EOS.

    Raises:
        ValueError: if the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to put between documents: set tokenizer.eos_token")
    head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, _CHUNK)):
        # verbose=False: a document longer than the model's context is no mistake here, it will be cut
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids:
            yield [*head, *ids, eos]


class RowPacker:
    """Lays tokenized documents end to end and cuts rows of `seq_len`; counts what it saw.

    A row is int32 [1, T], or [2, T] with `document_mask`: the tokens, and the number of each token's document.
    """

    def __init__(self, tokenizer: Any, seq_len: int, *, document_mask: bool = False) -> None:
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.num_documents = 0
        self.num_tokens = 0
        self.num_dropped = 0  # tokens of the last, incomplete row

    def rows(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The rows, as soon as each is full."""
        tokens, owners = array("i"), array("i")
        for number, ids in enumerate(iter_tokens(documents, self.tokenizer)):
            tokens.extend(ids)
            owners.extend([number] * len(ids)) if self.document_mask else None
            self.num_documents += 1
            self.num_tokens += len(ids)
            cut = len(tokens) // self.seq_len * self.seq_len
            for start in range(0, cut, self.seq_len):
                yield self._row(tokens, owners, start)
            del tokens[:cut], owners[:cut]
        self.num_dropped = len(tokens)

    def _row(self, tokens: array[int], owners: array[int], start: int) -> np.ndarray:
        parts = [tokens, owners] if self.document_mask else [tokens]
        return np.stack([np.array(part[start : start + self.seq_len], dtype=np.int32) for part in parts])

    def facts(self) -> dict[str, int]:
        """What was packed: documents, tokens, and the tokens dropped at the end."""
        return {"documents": self.num_documents, "tokens": self.num_tokens, "dropped_tokens": self.num_dropped}


def stack_rows(rows: list[np.ndarray]) -> Rows:
    """Rows of a RowPacker as `Rows`; document numbers become segment ids from 0 in every row."""
    packed = torch.from_numpy(np.stack(rows))  # [N, 1 or 2, T]
    if packed.shape[1] == 1:
        return Rows(packed[:, 0].contiguous())
    return Rows(packed[:, 0].contiguous(), segment_ids=packed[:, 1] - packed[:, 1, :1])


def pack_documents(
    documents: Iterable[str], tokenizer: Any, seq_len: int, *, document_mask: bool = False
) -> tuple[Rows, dict[str, int]]:
    """All documents as rows [N, seq_len], and the counts `documents`, `tokens`, `dropped_tokens`.

    Raises:
        ValueError: if there are fewer tokens than one row takes, or the tokenizer has no EOS.
    """
    packer = RowPacker(tokenizer, seq_len, document_mask=document_mask)
    rows = list(packer.rows(documents))
    if not rows:
        raise ValueError(too_few_tokens(packer.num_tokens, seq_len))
    log.info(
        "packed %d documents, %d tokens into %d rows of %d; the last %d tokens fill no row and are dropped",
        packer.num_documents, packer.num_tokens, len(rows), seq_len, packer.num_dropped,
    )  # fmt: skip
    return stack_rows(rows), packer.facts()


def too_few_tokens(num_tokens: int, seq_len: int) -> str:
    """The message for a text shorter than one row."""
    return (
        f"the text has {num_tokens} tokens, fewer than one row of seq_len={seq_len}: "
        f"use seq_len <= {num_tokens}, or give more text"
    )
