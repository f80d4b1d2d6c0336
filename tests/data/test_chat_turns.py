"""Labels are the assistant's words and nothing else, whatever the template, and what is lost is said aloud."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.data import ChatTurns
from kdqat.types import IGNORE_INDEX, Batch

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# renders an answer otherwise as soon as something follows, as templates that drop old reasoning do
REWRITING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}old: {% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def say(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


TALKS = [
    {"messages": say("Hello", "Good day.")},
    {"messages": say("One?", "Two — déjà vu.", "Three?", "Four.")},
    {"messages": say("Why", "Because.")},
    {"messages": say("Who", "Me.")},
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], name: str = "chat.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    return write


def whole_batch(path: str, tokenizer: Any, **kwargs: Any) -> Batch:
    """All rows of a file, in their order."""
    data = ChatTurns(path, **{"seq_len": 64, "val_rows": 0, **kwargs})
    data.bind(tokenizer)
    assert data._train is not None
    return data._train.batch(torch.arange(len(data._train)))


def answers(batch: Batch, tokenizer: Any) -> list[str]:
    """The labelled text of each row, runs of labels separated by a bar."""
    texts = []
    for labels in batch.labels.tolist():
        runs: list[list[int]] = [[]]
        for label in labels:
            if label == IGNORE_INDEX:
                runs += [[]] if runs[-1] else []
            else:
                runs[-1].append(label)
        texts.append("|".join(tokenizer.decode(run) for run in runs if run))
    return texts


@pytest.mark.parametrize(("template", "end"), [(PLAIN, "<|end|>"), (MARKED, "")])
def test_the_labelled_text_is_what_the_assistant_said(
    template: str, end: str, write: Callable[..., str], tokenizer: Any
) -> None:
    batch = whole_batch(write(TALKS), tokenizer, chat_template=template)
    expected = ["|".join(m["content"] + end for m in t["messages"] if m["role"] == "assistant") for t in TALKS]
    assert answers(batch, tokenizer) == expected
    labelled = batch.labels != IGNORE_INDEX
    assert torch.equal(batch.labels[labelled], batch.input_ids[labelled])


def test_rows_are_padded_on_the_right_and_masked(write: Callable[..., str], tokenizer: Any) -> None:
    batch = whole_batch(write(TALKS), tokenizer, chat_template=PLAIN)
    assert batch.input_ids.shape == (4, 64) and batch.attention_mask is not None
    for row, mask, talk in zip(batch.input_ids, batch.attention_mask, TALKS, strict=True):
        length = int(mask.sum())
        text = tokenizer.apply_chat_template(talk["messages"], chat_template=PLAIN, tokenize=False)
        assert tokenizer.decode(row[:length]) == text
        assert (mask[:length] == 1).all() and (row[length:] == tokenizer.pad_token_id).all()
    assert batch.segment_ids is None and batch.position_ids is None


def test_a_tokenizer_without_pad_pads_with_eos(write: Callable[..., str], make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(pad_token=None)
    assert whole_batch(write(TALKS), tokenizer, chat_template=PLAIN).input_ids[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "row",
    [
        {"messages": say("Add one to two.\n\n2", "three")},
        {"prompt": "Add one to two.\n\n2", "completion": "three"},
        {"prompt": say("Add one to two.\n\n2"), "completion": [{"role": "assistant", "content": "three"}]},
        {"instruction": "Add one to two.", "input": "2", "output": "three"},
        {"instruction": "Add one to two.\n\n2", "input": "", "output": "three"},
    ],
)
def test_every_form_of_a_row_is_the_same_conversation(
    row: dict[str, Any], write: Callable[..., str], tokenizer: Any
) -> None:
    batch = whole_batch(write([row]), tokenizer, chat_template=PLAIN)
    assert batch.attention_mask is not None
    text = tokenizer.decode(batch.input_ids[0][batch.attention_mask[0].bool()])
    assert text == "<|user|>Add one to two.\n\n2<|end|><|assistant|>three<|end|>"
    assert answers(batch, tokenizer) == ["three<|end|>"]


def test_packing_puts_whole_conversations_in_a_row_apart_from_each_other(
    write: Callable[..., str], tokenizer: Any
) -> None:
    path = write(TALKS)
    packed = whole_batch(path, tokenizer, chat_template=PLAIN, packing=True)
    padded = whole_batch(path, tokenizer, chat_template=PLAIN)
    assert len(packed.input_ids) < len(padded.input_ids)
    assert packed.attention_mask is not None and padded.attention_mask is not None
    assert packed.segment_ids is not None and packed.position_ids is not None
    real, alone = packed.attention_mask.bool(), padded.attention_mask.bool()
    assert packed.input_ids[real].tolist() == padded.input_ids[alone].tolist()
    assert packed.labels[real].tolist() == padded.labels[alone].tolist()
    assert "|".join(answers(packed, tokenizer)) == "|".join(answers(padded, tokenizer))
    starts = [m.sum().item() for m in (packed.position_ids == 0) & real]
    assert sum(starts) == len(TALKS)
    for segments, mask in zip(packed.segment_ids, real, strict=True):
        assert not set(segments[mask].tolist()) & set(segments[~mask].tolist())


def test_truncation_and_unanswered_conversations_are_said_aloud_and_counted(
    write: Callable[..., str], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*TALKS, {"messages": say("Q", "a" * 99)}, {"messages": say("q" * 99, "A")}, {"messages": say("alone")}]
    for _ in range(2):  # the second comes from the cache, and says so again
        data = ChatTurns(write(rows), chat_template=PLAIN, seq_len=64, val_rows=1)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kdqat.data"):
            data.bind(tokenizer)
        assert "2 of 7 conversations are cut at seq_len=64" in caplog.text
        assert "2 of 7 conversations are left out: no answer within seq_len=64" in caplog.text
    facts = data.describe()
    assert facts["conversations"] == 7 and facts["truncated"] == 2 and facts["unanswered"] == 2
    assert facts["train_rows"] == 4 and facts["val_rows"] == 1


def test_a_template_that_rewrites_turns_leaves_out_only_what_it_spoils(
    write: Callable[..., str], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kdqat.data"):
        batch = whole_batch(write(TALKS), tokenizer, chat_template=REWRITING)
    assert answers(batch, tokenizer) == ["Good day.<|end|>", "Because.<|end|>", "Me.<|end|>"]
    assert "1 of 4 conversations are left out: the chat template rewrites earlier turns" in caplog.text
    assert "{% generation %}" in caplog.text


def test_a_template_can_be_the_tokenizers_a_file_or_given(
    write: Callable[..., str], tokenizer: Any, tmp_path: Path
) -> None:
    path = write(TALKS)
    (tmp_path / "t.jinja").write_text(PLAIN)
    given = whole_batch(path, tokenizer, chat_template=PLAIN)
    from_file = whole_batch(path, tokenizer, chat_template=str(tmp_path / "t.jinja"))
    tokenizer.chat_template = PLAIN
    own = whole_batch(path, tokenizer)
    assert given.input_ids.tolist() == from_file.input_ids.tolist() == own.input_ids.tolist()
    assert whole_batch(path, tokenizer, chat_template=MARKED).labels.tolist() != own.labels.tolist()


def test_no_template_is_an_error_with_the_remedy(write: Callable[..., str], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no chat template: give chat_template"):
        whole_batch(write(TALKS), tokenizer)
    with pytest.raises(ValueError, match=r"missing\.jinja: is no jinja text and no file"):
        whole_batch(write(TALKS), tokenizer, chat_template="missing.jinja")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"row 0: has the keys text; a conversation has messages"),
        ({"messages": []}, r"row 0: a message list or text is needed"),
        ({"messages": [{"role": "user"}]}, r"row 0: a message is an object with role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content of a message is text, not list"),
        ({"messages": say("alone")}, r"no conversation of 1 can be trained on: 1 have no answer within seq_len=64"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str, write: Callable[..., str], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        whole_batch(write([row]), tokenizer, chat_template=PLAIN)


def test_a_refusal_of_the_template_names_the_row(write: Callable[..., str], tokenizer: Any) -> None:
    picky = "{% if messages[0].role != 'user' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    rows = [TALKS[0], {"messages": [{"role": "system", "content": "S"}, *say("a", "b")]}]
    with pytest.raises(ValueError, match=r"row 1: the chat template refuses it \(.*no system"):
        whole_batch(write(rows), tokenizer, chat_template=picky)


def test_rows_and_validation_files_choose_conversations(write: Callable[..., str], tokenizer: Any) -> None:
    path, other = write(TALKS), write(TALKS[3:], "val.jsonl")
    sliced = whole_batch(path, tokenizer, chat_template=PLAIN, rows="1:3")
    assert sliced.input_ids.tolist() == whole_batch(path, tokenizer, chat_template=PLAIN).input_ids[1:3].tolist()
    data = ChatTurns(path, val_path=other, chat_template=PLAIN, seq_len=64, val_rows=2)
    data.bind(tokenizer)
    (val,) = list(data.val_dataloader())
    assert answers(val, tokenizer) == ["Me.<|end|>"]
    assert data.describe()["train_rows"] == 4


def test_real_alpaca_rows_are_read(shared: Path, tokenizer: Any) -> None:
    path = shared / "data/instruct/alpaca_9k_random.jsonl.gz"
    data = ChatTurns(str(path), rows="0:50", chat_template=PLAIN, seq_len=512, val_rows=5)
    data.bind(tokenizer)
    assert data.describe()["conversations"] == 50
    assert data.describe()["train_rows"] + data.describe()["unanswered"] == 45
