"""The cache gives back what was made from the same inputs, and nothing else, whatever happens to its files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.data import PackedText, TextSource, text
from kdqat.data.cache import cache_dir


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of the corpus\n" for i in range(40)))
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every time that text is tokenized."""
    calls: list[int] = []
    pack = text.pack_documents

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return pack(*args, **kwargs)

    monkeypatch.setattr(text, "pack_documents", counted)
    return calls


def rows_of(path: Path, tokenizer: Any, **kwargs: Any) -> torch.Tensor:
    source = TextSource(path=str(path), split_lines=kwargs.pop("split_lines", True), rows=kwargs.pop("rows", None))
    data = PackedText(source, **{"seq_len": 16, "val_rows": 1, **kwargs})
    data.bind(tokenizer)
    assert data._train is not None
    return data._train.input_ids


def test_the_same_inputs_are_tokenized_once(corpus: Path, tokenizer: Any, builds: list[int]) -> None:
    first = rows_of(corpus, tokenizer)
    # what only chooses among the rows is no reason to make them again
    again = rows_of(corpus, tokenizer, batch_size=2, shuffle_seed=5)
    assert len(builds) == 1
    assert torch.equal(first, again)


def test_counts_come_back_with_the_rows(corpus: Path, tokenizer: Any) -> None:
    described = []
    for _ in range(2):
        data = PackedText(str(corpus), seq_len=16, val_rows=1)
        data.bind(tokenizer)
        described.append(data.describe())
    assert described[0] == described[1]
    assert {"train_rows", "val_rows", "documents", "tokens", "dropped_tokens"} == set(described[0])


@pytest.mark.parametrize(
    "change", [{"seq_len": 17}, {"document_mask": True}, {"limit": 30}, {"rows": "0:39"}, {"split_lines": False}]
)
def test_every_argument_that_changes_rows_changes_the_key(
    change: dict[str, Any], corpus: Path, tokenizer: Any, builds: list[int]
) -> None:
    rows_of(corpus, tokenizer)
    rows_of(corpus, tokenizer, **change)
    assert len(builds) == 2


def test_changed_text_and_changed_tokenizers_change_the_key(
    corpus: Path, make_tokenizer: Callable[..., Any], builds: list[int]
) -> None:
    rows_of(corpus, make_tokenizer())
    corpus.write_text(corpus.read_text().replace("line 7", "line 8"))  # the same length, at the same path
    rows_of(corpus, make_tokenizer())
    assert len(builds) == 2
    rows_of(corpus, make_tokenizer(bos=True))
    other = make_tokenizer()
    other.eos_token = "<|end|>"  # one that was there already: the tokenizer's JSON stays the same
    rows_of(corpus, other)
    assert len(builds) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_said_aloud_and_made_again(
    damage: str, corpus: Path, tokenizer: Any, builds: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = rows_of(corpus, tokenizer)
    (file,) = cache_dir().iterdir()
    good = file.read_bytes()
    file.write_bytes({"cut": good[:-10], "flipped": good[:-3] + b"\x05" + good[-2:], "empty": b""}[damage])
    again = rows_of(corpus, tokenizer)
    assert torch.equal(first, again)
    assert len(builds) == 2
    assert "is damaged" in caplog.text and str(file) in caplog.text
    rows_of(corpus, tokenizer)
    assert len(builds) == 2  # mended
    assert list(cache_dir().iterdir()) == [file]  # no temporary file is left


def test_a_cache_that_cannot_be_written_is_said_aloud_and_done_without(
    corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")  # root may write anywhere, but not below a file
    monkeypatch.setenv("KDQAT_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(rows_of(corpus, tokenizer)) > 1
    assert "cannot be written" in caplog.text and "KDQAT_CACHE" in caplog.text
