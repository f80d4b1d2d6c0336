"""Conversations: from a row of a data set to tokens, and which of the tokens an assistant wrote.

A chat template is a program that renders a whole conversation. Where it marks the assistant's words itself
({% generation %}), the marks decide. Where it does not, the words are found by rendering prefixes: what message i
adds to "messages before i, and the prompt for an answer" is the answer, its end mark included, because the model has
to learn to stop. That needs a template that renders a prefix of the conversation to a prefix of its text; those that
rewrite earlier turns (some drop old reasoning) do not, and such a conversation is refused rather than mislabelled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, str]
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Turns(NamedTuple):
    """A conversation as tokens."""

    input_ids: list[int]
    answers: list[bool]  # per token: an assistant wrote it


class NotAPrefix(ValueError):
    """The template rewrites earlier turns, so the answers cannot be found."""


def to_messages(row: Mapping[str, Any], where: str) -> list[Message]:
    """The messages of a row in one of three forms.

    `messages` [{role, content}]; `prompt` and `completion`, strings or lists of messages; `instruction`, `input` (may
    be missing) and `output`.

    Raises:
        ValueError: for a row in no such form; `where` names it.
    """
    if "messages" in row:
        messages = _as_messages(row["messages"], "user", where)
    elif "prompt" in row and "completion" in row:
        messages = _as_messages(row["prompt"], "user", where) + _as_messages(row["completion"], "assistant", where)
    elif "instruction" in row and "output" in row:
        request = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        messages = _as_messages(request, "user", where) + _as_messages(row["output"], "assistant", where)
    else:
        raise ValueError(
            f"{where}: has the keys {', '.join(row) or 'none'}; a conversation has messages, or prompt and completion, "
            "or instruction, input and output"
        )
    return messages


def _as_messages(value: Any, role: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: a message list or text is needed, not {type(value).__name__} {value!r}")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: a message is an object with role and content, not {message!r}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"{where}: the content of a message is text, not {kind}")
    return [dict(message) for message in value]


def has_generation_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's words itself."""
    return _MARKS.search(template) is not None


def encode_turns(messages: list[Message], tokenizer: Any, template: str) -> Turns:
    """A conversation as tokens, the assistant's marked.

    Raises:
        NotAPrefix: if the template has no generation marks and renders no prefixes.
        ValueError: if the template refuses the conversation, or the tokenizer cannot say where a token lies.
    """
    if has_generation_marks(template):
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return Turns(list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]])
    text = _render(messages, tokenizer, template)
    spans = answer_spans(messages, tokenizer, template)
    # special tokens are the template's business
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    where = encoded["offset_mapping"]
    answers = [any(a <= start < end <= b for a, b in spans) for start, end in where]
    return Turns(list(encoded["input_ids"]), answers)


def answer_spans(messages: list[Message], tokenizer: Any, template: str) -> list[tuple[int, int]]:
    """Where in the rendered text the assistant's answers lie, as (start, end) characters.

    Raises:
        NotAPrefix: if rendering a part of the conversation does not give a part of its text.
    """
    whole = _render(messages, tokenizer, template)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, template, add_generation_prompt=True) if i else ""
        after = _render(messages[: i + 1], tokenizer, template)
        if not (whole.startswith(after) and after.startswith(before)):
            raise NotAPrefix(f"the chat template renders message {i} differently when others follow or precede it")
        spans.append((len(before), len(after)))
    return spans


def _render(messages: list[Message], tokenizer: Any, template: str, *, add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
