"""A text as sentences, the unit of a sentence encoder.

Who measures on an own text has cut it: a line of a text file is a sentence, and so is a row of a file or data set with
columns. The embedded corpora are prose, and are cut here: at blank lines, and behind . ! and ?
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdqat.data.corpora import CORPORA
from kdqat.data.records import TEXT_SUFFIXES
from kdqat.data.texts import Texts, TextSource, as_sources, iter_documents

MIN_WORDS = 4  # of a sentence cut from a corpus; what is shorter is mostly the name of something
_ENDS = re.compile(r"\n\s*\n|(?<=[.!?])\s+")


def read_sentences(texts: Texts, *, limit: int | None = None) -> list[str]:
    """The different sentences of `texts`, in the order of the sources.

    Args:
        texts: as for every evaluator; see kdqat/data/texts.py.
        limit: at most so many, from the start; None: all.

    Raises:
        ValueError: for what cannot be read.
    """
    found: dict[str, None] = {}  # a sentence that comes twice would be like itself in every model
    for source in as_sources(texts):
        for sentence in _iter_sentences(source):
            found[sentence] = None
            if limit is not None and len(found) == limit:
                return list(found)
    return list(found)


def _iter_sentences(source: TextSource) -> Iterator[str]:
    if source.path in CORPORA:
        for document in iter_documents(source):
            pieces = (" ".join(piece.split()) for piece in _ENDS.split(document))
            yield from (piece for piece in pieces if len(piece.split()) >= MIN_WORDS)
        return
    by_line = source.path.endswith(TEXT_SUFFIXES)
    yield from (doc.strip() for doc in iter_documents(replace(source, split_lines=True) if by_line else source))


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each [B, T] int64: `rows` padded on the right to the longest."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids, mask
