"""Windows are cut as the papers cut them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.data import TextSource, pack_documents, windows


def decode(tensor: torch.Tensor, tokenizer: Any) -> str:
    return tokenizer.decode(tensor.flatten())


def test_wikitext2_keeps_newlines_and_joins_rows_by_two(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    path, tokenizer = tmp_path / "w.txt", make_tokenizer(bos=True)
    path.write_text(" \n = Title = \n \n Some text . \n")
    ids = windows(str(path), tokenizer, 2, protocol="wikitext2")
    # rows: "", " = Title = \n", "", " Some text . \n"; one BOS at the very beginning
    text = "<s>\n\n = Title = \n\n\n\n\n Some text . \n"
    assert decode(ids, tokenizer) in (text, text[:-1])
    assert ids.shape[1] == 2 and ids.dtype == torch.int64


def test_a_data_set_of_rows_gives_the_same_windows_as_the_file(tmp_path: Path, tokenizer: Any) -> None:
    import json

    rows = ["", " = Title = \n", "", " Some text . \n"]
    (tmp_path / "w.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "w.txt").write_text(" \n = Title = \n \n Some text . \n")
    for path in ("w.jsonl", "w.txt"):
        ids = windows(str(tmp_path / path), tokenizer, 5, protocol="wikitext2")
        assert ids.flatten().tolist() == tokenizer("\n\n".join(rows)).input_ids[: ids.numel()]


def test_ptb_joins_lines_by_a_space(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "p.txt").write_text(" no it was n't \n but <unk> \n")
    ids = windows(str(tmp_path / "p.txt"), tokenizer, 1, protocol="ptb")
    assert decode(ids, tokenizer) == "no it was n't but <unk>"


def test_packed_is_what_training_packs(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "p.txt").write_text("one line\n\nanother\nthird")
    source = TextSource(path=str(tmp_path / "p.txt"), split_lines=True)
    ids = windows(source, tokenizer, 6)
    assert ids.tolist() == pack_documents(["one line", "another", "third"], tokenizer, 6)[0].input_ids.tolist()
    assert windows(source, tokenizer, 6, limit=2).tolist() == ids[:2].tolist()


@pytest.mark.parametrize("protocol", ["packed", "wikitext2", "ptb"])
def test_too_little_text_says_which_seq_len_would_fit(protocol: Any, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "p.txt").write_text("short")
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, fewer than one row of seq_len=64: use seq_len <= "):
        windows(str(tmp_path / "p.txt"), tokenizer, 64, protocol=protocol)


def test_an_unknown_protocol_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="protocol 'c4' is unknown: use packed, wikitext2, ptb"):
        windows("kdqat:prose", tokenizer, 8, protocol="c4")  # type: ignore[arg-type]


def test_wikitext2_with_a_real_tokenizer_follows_the_stated_protocol(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    path = shared / "data/lm/wikitext2_raw_test.txt"
    with caplog.at_level(logging.WARNING):
        ids = windows(str(path), tokenizer, 512, protocol="wikitext2", limit=3)
    assert not [record for record in caplog.records if "longer than the specified maximum" in record.getMessage()]
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 4358
    text = "\n\n".join("" if not line.strip() else line + "\n" for line in lines)
    assert ids.shape == (3, 512)
    assert ids.flatten().tolist() == tokenizer(text[:20000]).input_ids[: 3 * 512]
    assert ids[0, 0] == tokenizer.bos_token_id and not (ids.flatten()[1:] == tokenizer.bos_token_id).any()
