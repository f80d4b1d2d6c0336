"""A row has one key, whoever asks for it and when; other rows have other keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.data import BlockLoader, PackedText, Rows

IDS = torch.arange(3, 27, dtype=torch.int32).reshape(3, 8)
ONES, SEGMENTS = torch.ones_like(IDS), torch.arange(8, dtype=torch.int32).div(4, rounding_mode="floor").expand(3, 8)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of the corpus\n" for i in range(60)))
    return path


def data_of(corpus: Path, tokenizer: Any, **changes: Any) -> PackedText:
    data = PackedText(str(corpus), **{"seq_len": 16, "batch_size": 2, "val_rows": 3, **changes})
    data.bind(tokenizer)
    return data


def test_a_row_keeps_its_key_in_other_batches_orders_and_ranks():
    rows = Rows(IDS.repeat(2, 1) + torch.arange(6, dtype=torch.int32)[:, None])
    keys = rows.row_keys()
    assert len(set(keys)) == 6 and all(len(key) == 16 for key in keys)
    assert rows.batch(torch.tensor([4, 1])).row_keys == (keys[4], keys[1])
    for rank, seed in ((0, 0), (1, 7)):
        loader = BlockLoader(rows, batch_size=1, training=True, seed=seed, rank=rank, world_size=2)
        for batch in loader:
            (key,) = batch.row_keys
            assert torch.equal(batch.input_ids[0], rows.input_ids[keys.index(key)].long())


def test_a_key_holds_what_a_model_sees_and_not_the_labels():
    def key(**parts: Any) -> bytes:
        return Rows(**{"input_ids": IDS, **parts}).row_keys()[0]

    assert key() == key(labels=-100 * ONES)
    seen = [key(), key(attention_mask=ONES), key(segment_ids=SEGMENTS), key(segment_ids=0 * ONES)]
    seen += [key(attention_mask=ONES, segment_ids=SEGMENTS), key(input_ids=IDS + 1), key(input_ids=IDS[:, :7])]
    assert len(set(seen)) == len(seen)
    mask = ONES.clone()
    mask[0, -1] = 0
    assert key(attention_mask=mask) != key(attention_mask=ONES)


def test_the_data_lists_every_key_a_run_can_ask_for(corpus: Path, tokenizer: Any) -> None:
    data = data_of(corpus, tokenizer)
    asked = {key for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader for key in b.row_keys}
    assert len(data.row_keys()) == data.describe()["train_rows"] + 3
    assert asked <= set(data.row_keys())
    shuffled = data_of(corpus, tokenizer, batch_size=1, shuffle_seed=9)
    assert shuffled.row_keys() == data.row_keys()


def test_another_packing_makes_other_rows(corpus: Path, tokenizer: Any) -> None:
    keys = set(data_of(corpus, tokenizer).row_keys())
    assert not keys & set(data_of(corpus, tokenizer, seq_len=15).row_keys())
    assert not keys & set(data_of(corpus, tokenizer, document_mask=True).row_keys())


def test_streamed_rows_have_keys_but_no_list(corpus: Path, tokenizer: Any) -> None:
    stream = data_of(corpus, tokenizer, streaming=True, batches_per_epoch=2, val_rows=0)
    known = set(data_of(corpus, tokenizer).row_keys())
    assert all(key in known for batch in stream.train_dataloader() for key in batch.row_keys)
    with pytest.raises(ValueError, match=r"streamed rows are not known.*streaming: false.*FrozenTeacher"):
        stream.row_keys()
