"""Windows of text for perplexity, cut as the papers cut them.

A perplexity is comparable only if the text was joined, tokenized and cut in the same way, so the way has a name:

    "packed"     documents closed with EOS and laid end to end, as in training
    "wikitext2"  the rows of the data set joined by two newlines, tokenized in one call (GPTQ and all after it)
    "ptb"        the lines joined by a space, tokenized in one call

Windows do not overlap; the remainder is dropped.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdqat.data.blocks import pack_documents, too_few_tokens
from kdqat.data.records import TEXT_SUFFIXES
from kdqat.data.texts import Texts, TextSource, as_sources, iter_documents, iter_raw

Protocol = Literal["packed", "wikitext2", "ptb"]


def windows(
    texts: Texts, tokenizer: Any, seq_len: int, *, protocol: Protocol = "packed", limit: int | None = None
) -> Tensor:
    """Windows [N, seq_len] int64 of a text.

    Args:
        texts: what to cut; for "wikitext2" and "ptb" a text file is taken line by line.
        tokenizer: with these two it adds what it adds to any text, usually one BOS at the very beginning.
        seq_len: tokens in a window; the papers' tables are for 2048.
        protocol: how the text is joined.
        limit: at most this many windows, from the beginning; None: all.

    Raises:
        ValueError: for an unknown protocol, unreadable text, or fewer tokens than one window takes.
    """
    if protocol == "packed":
        ids = pack_documents(iter_documents(texts), tokenizer, seq_len)[0].input_ids.long()
        return ids[:limit]
    if protocol == "wikitext2":
        text = "\n\n".join(row for source in as_sources(texts) for row in _wikitext2_rows(source))
    elif protocol == "ptb":
        text = " ".join(row.strip() for source in as_sources(texts) for row in _lines(source))
    else:
        raise ValueError(f"protocol {protocol!r} is unknown: use packed, wikitext2, ptb")
    # verbose=False: the text is longer than the model's context on purpose
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    num_windows = len(ids) // seq_len
    if num_windows == 0:
        raise ValueError(too_few_tokens(len(ids), seq_len))
    return ids[: num_windows * seq_len].view(num_windows, seq_len)[:limit]


def _lines(source: TextSource) -> list[str]:
    """The rows of a data set; of a text file its lines, where the newline at the end opens no further one."""
    documents = list(iter_raw(source))
    if not source.path.endswith(TEXT_SUFFIXES) or source.split_lines:
        return documents
    lines = documents[0].split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _wikitext2_rows(source: TextSource) -> list[str]:
    """The rows as the data set has them: blank ones empty, the others with their newline."""
    rows = [row.removesuffix("\n") for row in _lines(source)]
    return [f"{row}\n" if row.strip() else "" for row in rows]
