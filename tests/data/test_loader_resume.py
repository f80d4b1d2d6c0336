"""The order of batches repeats, ranks share it, and a resumed run goes on with the very next batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from kdqat.data import BlockLoader, Rows, StreamLoader, TextData
from kdqat.types import Batch

NUM_ROWS, BATCH = 40, 2  # 20 batches an epoch
ROWS = Rows(torch.arange(NUM_ROWS, dtype=torch.int32).view(-1, 1).repeat(1, 3))  # a row's tokens are its number

Ids = tuple[int, ...]


def ids(batches: Iterable[Batch]) -> list[Ids]:
    return [tuple(batch.input_ids[:, 0].tolist()) for batch in batches]


def block(**kwargs: Any) -> BlockLoader:
    return BlockLoader(kwargs.pop("rows", ROWS), **{"batch_size": BATCH, "training": True, "seed": 1, **kwargs})


def stream(**kwargs: Any) -> StreamLoader:
    arguments = {"batch_size": BATCH, "num_batches": 20, "buffer_rows": 7, "seed": 1, **kwargs}
    return StreamLoader(lambda: iter(ROWS.input_ids.numpy()[:, None, :]), **arguments)


LOADERS = pytest.mark.parametrize("make", [block, stream])


@LOADERS
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(make: Any) -> None:
    one, two = make(), make()
    torch.manual_seed(0)
    first = ids(one)
    torch.manual_seed(1)
    assert first == ids(two)
    assert first != ids(make(seed=2))
    second = ids(one)  # the next epoch: other batches, the same rows
    assert second != first
    assert sorted(sum(second, ())) == sorted(sum(first, ())) == list(range(NUM_ROWS))
    assert first != sorted(first)


@LOADERS
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows_and_get_equally_many_batches(make: Any, world_size: int) -> None:
    number = 20 // world_size
    length = {"num_batches": number} if make is stream else {}
    ranks = [ids(make(rank=r, world_size=world_size, **length)) for r in range(world_size)]
    assert {len(batches) for batches in ranks} == {number}
    seen = [row for batches in ranks for batch in batches for row in batch]
    assert len(set(seen)) == len(seen)


@LOADERS
def test_two_ranks_see_what_one_sees_that_accumulates_two_batches(make: Any) -> None:
    alone = ids(make())
    shared = [ids(make(rank=r, world_size=2)) for r in range(2)]
    assert list(zip(*shared, strict=True))[:10] == list(zip(alone[::2], alone[1::2], strict=True))


def test_what_fills_no_batch_is_another_part_in_each_epoch() -> None:
    loader = block(rows=ROWS[:39], batch_size=4)
    assert len(loader) == 9
    missing = [set(range(39)) - set(sum(ids(loader), ())) for _ in range(3)]
    assert all(len(m) == 3 for m in missing) and missing[0] != missing[1]


@pytest.mark.parametrize(("world_size", "expected"), [(1, 39), (2, 38), (4, 36)])
def test_validation_keeps_the_order_and_nearly_every_row(world_size: int, expected: int) -> None:
    loaders = [
        BlockLoader(ROWS[:39], batch_size=4, training=False, rank=r, world_size=world_size) for r in range(world_size)
    ]
    passes = [[row for batch in ids(loader) for row in batch] for loader in loaders]
    assert {len(list(loader)) for loader in loaders} == {len(loaders[0])}
    assert all(rows == sorted(rows) for rows in passes)
    assert sorted(row for rows in passes for row in rows) == list(range(expected))
    assert ids(loaders[0]) == ids(loaders[0])  # every pass begins at the beginning


def test_no_batch_for_some_process_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"3 rows make no batch.*needs 4; lower batch_size"):
        block(rows=ROWS[:3], batch_size=4)
    with pytest.raises(ValueError, match=r"2 process\(es\) needs 80 rows"):
        next(iter(stream(batch_size=40, world_size=2)))


@LOADERS
def test_a_state_goes_on_with_the_next_batch_over_the_end_of_an_epoch(make: Any) -> None:
    whole = make()
    expected = ids(whole) + ids(whole) + ids(whole)
    for stop in (0, 1, 7, 19, 20, 27):
        first = make()
        seen = []
        while len(seen) < stop:
            for batch in first:
                seen += ids([batch])
                if len(seen) == stop:
                    break
        second = make()
        second.load_state_dict(first.state_dict())
        assert seen + ids(second) == expected[: stop + 20]


@LOADERS
@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 2}, {"world_size": 2}])
def test_a_state_of_another_order_is_refused(make: Any, change: dict[str, int]) -> None:
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{key} \d -> {value}.*resume with the data arguments"):
        make(**change).load_state_dict(make().state_dict())


class Recorder(L.LightningModule):
    """Trains one number and writes down which rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Ids] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen += ids([batch])
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAndStop(L.Callback):
    """Saves after `batches` batches, at the end of the batch or of the epoch."""

    def __init__(self, path: Path, batches: int, at: str) -> None:
        self.path, self.batches, self.at = path, batches, at

    def save(self, trainer: L.Trainer, module: Any) -> None:
        if len(module.seen) == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self.at == "batch":
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.at == "epoch":
            self.save(trainer, pl_module)


class RowsData(TextData):
    """The rows above behind the real data module."""

    def __init__(self, make: Any) -> None:
        super().__init__(batch_size=BATCH)
        self.make = make

    def make_rows(self, tokenizer: Any) -> Any:
        return ROWS, ROWS[:4], {}

    def make_train_loader(self) -> Any:
        return self.make(**self.rank_and_world())


def fit(make: Any, *, callbacks: Any = (), resume: Path | None = None, **kwargs: Any) -> list[Ids]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu", enable_checkpointing=False, use_distributed_sampler=False,
            callbacks=list(callbacks), **quiet, **kwargs,
        )  # fmt: skip
        data, module = RowsData(make), Recorder()
        data.bind("any")
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


@LOADERS
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 60}, {"max_epochs": 3, "limit_train_batches": 12}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_gets_exactly_the_batches_of_an_uninterrupted_one(
    make: Any, length: dict[str, int], accumulate: int, tmp_path: Path
) -> None:
    kwargs = {**length, "accumulate_grad_batches": accumulate}
    if "max_steps" in length:
        kwargs["max_steps"] = 60 // accumulate
    epoch = length.get("limit_train_batches", 20)
    whole = fit(make, **kwargs)
    assert len(whole) == 3 * epoch
    for batches, at in ((7, "batch"), (epoch, "batch"), (epoch + 7, "batch"), (2 * epoch, "epoch")):
        path = tmp_path / f"{batches}{at}.ckpt"
        before = fit(make, callbacks=[SaveAndStop(path, batches, at)], **kwargs)
        after = fit(make, resume=path, **kwargs)
        assert before[:batches] == whole[:batches]
        # Lightning may train less than it should after an epoch's end with max_steps; never on other batches.
        assert after == whole[batches : batches + len(after)]
        assert len(after) >= len(whole) - batches - (accumulate - 1)


def test_reloading_loaders_is_refused_because_the_order_would_begin_again() -> None:
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs"):
        fit(block, max_epochs=2, reload_dataloaders_every_n_epochs=1)


def test_a_second_fit_begins_at_the_beginning() -> None:
    assert fit(block, max_epochs=1) == fit(block, max_epochs=1)
