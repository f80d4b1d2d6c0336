"""Packing loses nothing but the counted remainder, and a document mask says where documents begin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdqat.data import pack_documents
from kdqat.types import IGNORE_INDEX

DOCUMENTS = ["abc", "defghij", "k", "lmnop" * 5, "q"]


def stream_of(tokenizer: Any) -> list[int]:
    """The definition, written plainly."""
    stream: list[int] = []
    for document in DOCUMENTS:
        stream += [*tokenizer(document).input_ids, tokenizer.eos_token_id]  # this keeps the tokenizer's own BOS
    return stream


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("seq_len", [2, 7, 16])
def test_rows_end_to_end_are_the_token_stream(bos: bool, seq_len: int, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(bos=bos)
    rows, facts = pack_documents(DOCUMENTS, tokenizer, seq_len)
    stream = stream_of(tokenizer)
    assert rows.input_ids.flatten().tolist() == stream[: len(stream) // seq_len * seq_len]
    assert facts == {"documents": 5, "tokens": len(stream), "dropped_tokens": len(stream) % seq_len}


def test_a_bos_token_that_the_tokenizer_does_not_use_is_not_added(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(bos=False, bos_token="<s>")
    rows, _ = pack_documents(DOCUMENTS, tokenizer, 5)
    assert tokenizer.bos_token_id is not None
    assert not (rows.input_ids == tokenizer.bos_token_id).any()


def test_dropped_tokens_are_said_aloud(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kdqat.data"):
        _, facts = pack_documents(DOCUMENTS, tokenizer, 8)
    assert facts["dropped_tokens"] > 0
    assert f"the last {facts['dropped_tokens']} tokens fill no row and are dropped" in caplog.text


def test_too_little_text_says_which_seq_len_would_fit(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the text has 4 tokens, fewer than one row of seq_len=5: use seq_len <= 4"):
        pack_documents(["abc"], tokenizer, 5)


def test_a_tokenizer_without_eos_is_refused_with_the_remedy(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer\.eos_token"):
        pack_documents(DOCUMENTS, make_tokenizer(eos_token=None), 5)


def test_segments_and_positions_restart_with_every_document(tokenizer: Any) -> None:
    rows, _ = pack_documents(DOCUMENTS, tokenizer, 10, document_mask=True)
    batch = rows.batch(torch.arange(2))
    # abc. defgh | ij. k. lmnop ...
    assert batch.segment_ids is not None and batch.position_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1, 2, 3, 4, 5]]
    starts = batch.position_ids == 0
    assert (batch.labels[starts] == IGNORE_INDEX).all()
    assert (batch.labels[~starts] == batch.input_ids[~starts]).all()


def test_without_a_mask_every_token_is_a_label_and_nothing_else_is_sent(tokenizer: Any) -> None:
    rows, _ = pack_documents(DOCUMENTS, tokenizer, 10)
    batch = rows.batch(torch.tensor([2, 0]))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.input_ids, rows.input_ids[[2, 0]].long())
    assert torch.equal(batch.labels, batch.input_ids)
    assert batch.attention_mask is batch.segment_ids is batch.position_ids is None
