"""Conversations for fine-tuning and distillation: the loss counts what the assistant says, nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from kdqat.data.base import TextData
from kdqat.data.blocks import Rows
from kdqat.data.cache import Packed, cached, source_fingerprint
from kdqat.data.records import iter_records, looks_like_file, take_rows
from kdqat.data.turns import NotAPrefix, Turns, encode_turns, to_messages
from kdqat.files import tokenizer_fingerprint
from kdqat.types import IGNORE_INDEX

log = logging.getLogger(__name__)


class ChatTurns(TextData):
    """Conversations rendered by the tokenizer's chat template; labels are the assistant's turns.

    A row of the file has `messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`. Every
    conversation starts a row, padded on the right; longer ones are cut at `seq_len`. What was cut, and what was left
    out because no answer fits, is logged and counted in `describe`.

    Args:
        path: .jsonl, .jsonl.gz, .parquet, or a data set "NAME" or "NAME:CONFIG".
        rows: slice of the file's rows, e.g. "0:1000"; None: all.
        split: split of a data set; None: "train".
        val_path: file of conversations to validate on: its first `val_rows` rows. None: the last ones of `path`.
        chat_template: a template in jinja, or a file that holds one; None: the tokenizer's own.
        packing: put several whole conversations in a row, apart from each other by segment_ids and position_ids.
        seq_len, batch_size, shuffle_seed, val_rows: see `TextData`.
    """

    def __init__(
        self,
        path: str,
        *,
        rows: str | None = None,
        split: str | None = None,
        val_path: str | None = None,
        chat_template: str | None = None,
        packing: bool = False,
        seq_len: int = 1024,
        batch_size: int = 4,
        shuffle_seed: int = 0,
        val_rows: int = 16,
    ) -> None:
        super().__init__(seq_len=seq_len, batch_size=batch_size, shuffle_seed=shuffle_seed, val_rows=val_rows)
        self.path = os.path.expanduser(path)
        self.rows = rows
        self.split = split
        self.val_path = None if val_path is None else os.path.expanduser(val_path)
        self.chat_template = chat_template
        self.packing = packing

    def make_rows(self, tokenizer: Any) -> tuple[Rows | None, Rows | None, dict[str, int]]:
        """See `TextData.make_rows`."""
        template = self._template(tokenizer)
        train, facts = self._encode(self.path, tokenizer, template, self.rows, self.split)
        if self.val_path is None:
            return *self.hold_out(train), facts
        val = self._encode(self.val_path, tokenizer, template, None, None)[0] if self.val_rows else None
        return train, val[: self.val_rows] if val is not None else None, facts

    def _template(self, tokenizer: Any) -> str:
        given = self.chat_template
        if given is None:
            if isinstance(tokenizer.chat_template, str):
                return tokenizer.chat_template
            raise ValueError("the tokenizer has no chat template: give chat_template (jinja text, or its file)")
        if "{" in given:
            return given
        try:
            return Path(given).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"chat_template {given}: is no jinja text and no file ({error.strerror})") from error

    def _encode(self, path: str, tokenizer: Any, template: str, rows: str | None, split: str | None) -> Packed:
        key = None
        # a data set has no bytes to tell one version from another; it is tokenized again
        if looks_like_file(path) and (tokens_of := tokenizer_fingerprint(tokenizer)) is not None:
            key = {
                "kind": "chat",
                "file": [path.endswith(".parquet"), source_fingerprint(path)],
                "tokenizer": tokens_of,
                "template": template,
                "rows": rows,
                "seq_len": self.seq_len,
                "packing": self.packing,
            }
        packed = cached(key, lambda: self._build(path, tokenizer, template, rows, split))
        _say_losses(path, packed[1], self.seq_len)
        return packed

    def _build(self, path: str, tokenizer: Any, template: str, rows: str | None, split: str | None) -> Packed:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("the tokenizer has neither a PAD nor an EOS token: set tokenizer.pad_token")
        facts = dict.fromkeys(("conversations", "tokens", "answer_tokens", "truncated", "unanswered", "unlabelled"), 0)
        records = take_rows(iter_records(path, split=split), rows, path)
        kept = list(_keep(records, path, tokenizer, template, self.seq_len, facts))
        if not kept:
            raise ValueError(
                f"{path}: no conversation of {facts['conversations']} can be trained on: {facts['unanswered']} have no "
                f"answer within seq_len={self.seq_len} (raise it), the chat template keeps {facts['unlabelled']} from "
                "being labelled (give a chat_template with {% generation %} marks)"
            )
        groups = _fill(kept, self.seq_len) if self.packing else [[turns] for turns in kept]
        return pad_rows(groups, self.seq_len, pad), facts


def _keep(
    records: Iterable[dict[str, Any]],
    path: str,
    tokenizer: Any,
    template: str,
    seq_len: int,
    facts: dict[str, int],
) -> Iterator[Turns]:
    """The conversations that teach something, cut at `seq_len`; counts into `facts`."""
    for number, row in enumerate(records):
        where = f"{path}, row {number}"
        messages = to_messages(row, where)
        facts["conversations"] += 1
        try:
            turns = encode_turns(messages, tokenizer, template)
        except NotAPrefix:
            facts["unlabelled"] += 1
            continue
        except Exception as error:  # a template is a program and raises what it likes
            raise ValueError(f"{where}: the chat template refuses it ({error})") from error
        facts["truncated"] += len(turns.input_ids) > seq_len
        turns = Turns(turns.input_ids[:seq_len], turns.answers[:seq_len])
        if not any(turns.answers[1:]):  # the first token of a row is predicted by nothing
            facts["unanswered"] += 1
            continue
        facts["tokens"] += len(turns.input_ids)
        facts["answer_tokens"] += sum(turns.answers)
        yield turns


def _say_losses(path: str, facts: dict[str, int], seq_len: int) -> None:
    total = facts["conversations"]
    if facts["truncated"]:
        log.warning("%s: %d of %d conversations are cut at seq_len=%d", path, facts["truncated"], total, seq_len)
    if facts["unanswered"]:
        log.warning(
            "%s: %d of %d conversations are left out: no answer within seq_len=%d",
            path, facts["unanswered"], total, seq_len,
        )  # fmt: skip
    if facts["unlabelled"]:
        log.warning(
            "%s: %d of %d conversations are left out: the chat template rewrites earlier turns, so answers cannot be "
            "told apart; give a chat_template with {%% generation %%} marks",
            path, facts["unlabelled"], total,
        )  # fmt: skip


def _fill(conversations: list[Turns], seq_len: int) -> Iterator[list[Turns]]:
    """Whole conversations for one row each time, in their order."""
    row: list[Turns] = []
    space = seq_len
    for turns in conversations:
        if len(turns.input_ids) > space:
            yield row
            row, space = [], seq_len
        row.append(turns)
        space -= len(turns.input_ids)
    yield row


def pad_rows(groups: Iterable[list[Turns]], seq_len: int, pad: int) -> Rows:
    """One row [seq_len] for each group of conversations, padded on the right.

    Several in one row get segment ids, and the padding one of its own, so that no token attends to nothing.
    """
    ids, labels, mask, segments = [], [], [], []
    packed = False
    for group in groups:
        packed = packed or len(group) > 1
        tokens = [token for turns in group for token in turns.input_ids]
        rest = seq_len - len(tokens)
        answers = [answer for turns in group for answer in turns.answers]
        ids.append(tokens + [pad] * rest)
        labels.append([t if a else IGNORE_INDEX for t, a in zip(tokens, answers, strict=True)] + [IGNORE_INDEX] * rest)
        mask.append([1] * len(tokens) + [0] * rest)
        segments.append([n for n, turns in enumerate(group) for _ in turns.input_ids] + [len(group)] * rest)
    ids_, labels_, mask_, segments_ = (torch.tensor(x, dtype=torch.int32) for x in (ids, labels, mask, segments))
    return Rows(ids_, labels_, mask_, segments_ if packed else None)
