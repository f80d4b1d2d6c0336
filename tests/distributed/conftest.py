"""The runs all tests here look at: one launch of one process, one launch of two, shared by the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import DDP, SHARDED, SINGLE, STRATEGIES, Jobs, callback, fsdp2, write_inputs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    write_inputs(path)
    return path


@pytest.fixture(scope="session")
def single(folder: Path) -> Jobs:
    """The same rows in one process: fp32 in larger batches, bf16 (where the batch decides the rounding) in more."""
    jobs = Jobs(folder, "single")
    jobs.add("single_fp32", SINGLE, batch_size=4)
    jobs.add("single_best", SINGLE, batch_size=4, select="best", evaluate=True)
    jobs.add("single_bf16", SINGLE, accumulate=4, precision="bf16-mixed")
    jobs.add("single_unclipped", SINGLE, batch_size=4, clip=None)
    jobs.validate("single_fp32")
    return jobs.run(1)


@pytest.fixture(scope="session")
def two(folder: Path) -> Jobs:
    """The runs of two processes."""
    jobs = Jobs(folder, "two")
    jobs.add("ddp_fp32", DDP, callbacks=(callback("SlowRankOne"),))
    jobs.add("fsdp2_fp32", fsdp2(), parallel=SHARDED, callbacks=(callback("SlowRankOne"),))
    jobs.add("ddp_bf16", DDP, precision="bf16-mixed")
    jobs.add("fsdp2_bf16", fsdp2(), parallel=SHARDED, precision="bf16-mixed")
    recomputed = {"checkpoint_blocks": True}
    jobs.add("fsdp2_recomputed", fsdp2(), parallel={**SHARDED, **recomputed}, chunk_tokens=8)
    jobs.add("ddp_recomputed", DDP, parallel=recomputed, chunk_tokens=8)
    for name, (trainer, parallel) in STRATEGIES.items():
        jobs.add(f"{name}_stopped", trainer, parallel=parallel, callbacks=(callback("StopRankZero", at=4),))
        jobs.resume(f"{name}_stopped")
        jobs.add(f"{name}_broken", trainer, parallel=parallel, callbacks=(callback("BreakRankOne", at=5),))
    for name in ("ddp_fp32", "fsdp2_fp32"):
        jobs.validate(name)
    jobs.add("folder_checkpoint", fsdp2(save_distributed_checkpoint=True), parallel=SHARDED)
    jobs.add("shard_without_strategy", DDP, parallel=SHARDED)
    jobs.add("strategy_without_shard", fsdp2())
    return jobs.run(2)
