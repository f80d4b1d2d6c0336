"""PackedText from files to batches: what is held out, what is refused, and that streaming sees the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from kdqat.data import BlockLoader, PackedText, PythonDocs, TextData, TextSource, pack_documents, read_documents
from kdqat.types import Batch


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {i} says {i * i}"}) + "\n" for i in range(60)))
    return str(path)


def bound(data: TextData, tokenizer: Any) -> Any:
    data.bind(tokenizer)
    return data


def row_set(loader: Iterable[Batch]) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in loader for row in batch.input_ids.tolist()}


def test_the_last_rows_are_held_out_and_never_trained_on(corpus: str, tokenizer: Any) -> None:
    data = bound(PackedText(corpus, seq_len=32, batch_size=1, val_rows=5), tokenizer)
    rows, _ = pack_documents(read_documents(corpus), tokenizer, 32)
    everything = [tuple(row) for row in rows.input_ids.tolist()]
    assert len(set(everything)) == len(everything)
    assert row_set(data.val_dataloader()) == set(everything[-5:])
    assert row_set(data.train_dataloader()) == set(everything[:-5])
    assert data.describe()["train_rows"] == len(everything) - 5


def test_a_validation_text_of_its_own_leaves_all_rows_to_training(corpus: str, tokenizer: Any) -> None:
    data = bound(PackedText(corpus, val_text="kdqat:prose", seq_len=32, val_rows=3, batch_size=1), tokenizer)
    prose, _ = pack_documents(read_documents("kdqat:prose"), tokenizer, 32)
    assert row_set(data.val_dataloader()) == {tuple(row) for row in prose.input_ids[:3].tolist()}
    rows, _ = pack_documents(read_documents(corpus), tokenizer, 32)
    assert len(row_set(data.train_dataloader())) == len(rows)


def test_without_validation_rows_there_is_no_validation(corpus: str, tokenizer: Any) -> None:
    data = bound(PackedText(corpus, val_text="kdqat:prose", seq_len=32, val_rows=0), tokenizer)
    assert data.val_dataloader() == []
    assert data.describe()["val_rows"] == 0


def test_streaming_gives_the_rows_that_memory_gives(corpus: str, tokenizer: Any) -> None:
    rows, _ = pack_documents(read_documents(corpus), tokenizer, 32)
    everything = [tuple(row) for row in rows.input_ids.tolist()]
    data = bound(
        PackedText(
            corpus, streaming=True, buffer_rows=8, batches_per_epoch=len(everything) - 5,
            seq_len=32, batch_size=1, val_rows=5, document_mask=True,
        ),
        tokenizer,
    )  # fmt: skip
    assert row_set(data.val_dataloader()) == set(everything[:5])
    batches = list(data.train_dataloader())
    assert row_set(batches) == set(everything[5:])
    assert batches[0].segment_ids is not None and batches[0].position_ids is not None


def test_a_limit_counts_documents(corpus: str, tokenizer: Any) -> None:
    data = bound(PackedText(corpus, limit=10, seq_len=16, val_rows=1), tokenizer)
    assert data.describe()["documents"] == 10
    streamed = bound(PackedText(corpus, limit=1, seq_len=16, val_rows=0, streaming=True, batch_size=1), tokenizer)
    text = tokenizer.decode(next(iter(streamed.train_dataloader())).input_ids[0])
    assert read_documents(corpus)[0].startswith(text)


def test_rows_longer_than_the_model_are_refused_before_anything_is_read(tokenizer: Any) -> None:
    data = PackedText("missing.txt", seq_len=1024)
    with pytest.raises(ValueError, match="seq_len=1024 is longer than the model's 512 positions: use seq_len <= 512"):
        data.bind(tokenizer, max_positions=512)
    with pytest.raises(ValueError, match=r"missing\.txt"):
        data.bind(tokenizer, max_positions=1024)


def test_binding_twice_reads_once_and_another_tokenizer_reads_again(
    corpus: str, tokenizer: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bound(PackedText(corpus, seq_len=16, val_rows=1), tokenizer)
    before = data._train
    data.bind(tokenizer, max_positions=16)
    assert data._train is before
    data.bind(make_tokenizer(bos=True))
    assert data._train is not before


def test_a_module_without_tokenizer_says_so(corpus: str) -> None:
    for call in (PackedText(corpus).train_dataloader, PackedText(corpus).val_dataloader, PackedText(corpus).describe):
        with pytest.raises(ValueError, match="call bind"):
            call()


@pytest.mark.parametrize("kwargs", [{"val_rows": 1000}, {"seq_len": 1000, "val_rows": 1, "limit": 30}])
def test_too_little_text_names_the_arguments_to_lower(kwargs: dict[str, int], corpus: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="seq_len"):
        PackedText(corpus, **{"seq_len": 16, **kwargs}).bind(tokenizer)
    with pytest.raises(ValueError, match="seq_len"):
        PackedText(corpus, streaming=True, **{"seq_len": 16, **kwargs}).bind(tokenizer)


@pytest.mark.parametrize(
    "kwargs",
    [{"seq_len": 1}, {"batch_size": 0}, {"val_rows": -1}, {"shuffle_seed": -1}, {"limit": 0}, {"buffer_rows": 5},
     {"batches_per_epoch": 5}, {"buffer_rows": 0, "streaming": True}],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_by_name(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PackedText("a.txt", **kwargs)


def test_the_strategy_says_which_processes_share_the_data(corpus: str, tokenizer: Any) -> None:
    seen = []
    for rank in range(2):
        data = bound(PackedText(corpus, seq_len=32, batch_size=2, val_rows=4), tokenizer)
        shared = {"num_replicas": 2, "rank": rank}  # of the data, not of all processes: world_size differs
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=shared, world_size=8, global_rank=7)
        loader = data.train_dataloader()
        assert (loader.rank, loader.world_size) == (rank, 2)
        assert isinstance(val := data.val_dataloader(), BlockLoader) and val.world_size == 2
        seen.append(row_set(loader))
    assert not seen[0] & seen[1]


def test_python_docs_trains_and_validates_on_different_halves(tokenizer: Any) -> None:
    data = bound(PythonDocs(seq_len=256, batch_size=8, val_rows=8), tokenizer)
    heldout, _ = pack_documents(read_documents("python_docs:heldout"), tokenizer, 256)
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch.input_ids, heldout.input_ids[:8].long())
    assert data.describe()["train_rows"] > 5000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.txt", "a.txt"),
        ({"path": "a.jsonl", "keys": ["title"]}, TextSource(path="a.jsonl", keys=("title",))),
        (["a.txt", {"path": "b.jsonl", "rows": "0:5"}], ["a.txt", TextSource(path="b.jsonl", rows="0:5")]),
    ],
)
def test_a_recipe_can_name_texts_in_all_three_forms(value: Any, expected: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextData, "data")
    config = {"data": {"class_path": "kdqat.data.PackedText", "init_args": {"text": value, "seq_len": 8}}}
    data = parser.instantiate_classes(parser.parse_object(config)).data
    assert isinstance(data, PackedText)
    assert data.text == expected
