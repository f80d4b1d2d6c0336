"""A text as sentences: a user's own as it was cut, a corpus cut here; each sentence once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdqat.data import TextSource
from kdqat.data.sentences import MIN_WORDS, read_sentences


def test_a_line_of_a_text_file_is_a_sentence_blank_lines_and_repetitions_are_none(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("A man plays. He is old.\n\n  A dog runs.\t\nA man plays. He is old.\nno\n")
    assert read_sentences(str(path)) == ["A man plays. He is old.", "A dog runs.", "no"]
    assert read_sentences(TextSource(path=str(path), rows="2:4")) == ["A dog runs.", "A man plays. He is old."]


def test_a_row_of_a_file_with_columns_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "sts.jsonl"
    path.write_text("\n".join(json.dumps({"premise": text}) for text in ("One. Two.", "Three")))
    assert read_sentences(TextSource(path=str(path), keys=("premise",))) == ["One. Two.", "Three"]


def test_a_corpus_is_cut_into_sentences() -> None:
    sentences = read_sentences("kdqat:prose")
    assert "The lamp was smaller than she remembered." in sentences and len(sentences) > 100
    assert all(len(sentence.split()) >= MIN_WORDS and "\n" not in sentence for sentence in sentences)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_takes_different_sentences_from_the_start_of_the_first_source(tmp_path: Path, limit: int) -> None:
    (tmp_path / "a.txt").write_text("one\none\ntwo\n")
    (tmp_path / "b.txt").write_text("two\nthree\nfour\n")
    texts: list[str | TextSource] = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert read_sentences(texts, limit=limit) == ["one", "two", "three"][:limit]
    assert len(read_sentences(texts)) == 4


def test_an_empty_file_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt: holds no text"):
        read_sentences(str(tmp_path / "empty.txt"))
