"""The traced forward pass saves byte for byte what a real one saves, and compiling keeps what the partitioner keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from kdqat.allocate import Uniform
from kdqat.models import ModelSource, SplitModel, blocks_of, embedding_refs, layer_refs
from kdqat.quant import LSQ
from kdqat.student.prepare import install_plan
from kdqat.training.planner.activations import count_kept
from kdqat.training.planner.trace import Rows, trace_forward
from kdqat.types import Batch
from tests.training.toy import batch

PLAIN: frozenset[str] = frozenset()


def student(kind: str, scheme: str, *, meta: bool) -> SplitModel:
    source = ModelSource(f"toy:{kind}")
    split = SplitModel(source.load_meta() if meta else source.load_model())
    plan = Uniform(scheme).allocate([*layer_refs(split.model), *embedding_refs(split.model)])
    install_plan(split.model, plan, LSQ, None)
    return split.train()


def really_saved(split: SplitModel, rows: Batch, dtype: torch.dtype | None, wants: frozenset[str] = PLAIN) -> int:
    own = {t.untyped_storage()._cdata for t in [*split.parameters(), *split.buffers()]}
    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", dtype, enabled=dtype is not None), hooks:
        split(rows, wants)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bf16", "fp32"])
def test_what_autograd_saves_is_counted_exactly(kind: str, dtype: torch.dtype | None) -> None:
    trace = trace_forward(
        student(kind, "W4A16_G32", meta=True), Rows(batch_size=2, seq_len=48), wants=PLAIN, autocast=dtype, device="cpu"
    )
    counted = trace.size(set().union(*trace.saved.values()))
    assert counted == really_saved(student(kind, "W4A16_G32", meta=False), batch(2, 48), dtype)


@pytest.mark.parametrize("scheme", ["W8A8", "NVFP4", "W4A16_ASYM_G32"])
def test_every_kind_of_scheme_is_counted_exactly(scheme: str) -> None:
    rows = Rows(batch_size=1, seq_len=32)
    trace = trace_forward(student("llama", scheme, meta=True), rows, wants=PLAIN, autocast=None, device="cpu")
    counted = trace.size(set().union(*trace.saved.values()))
    assert counted == really_saved(student("llama", scheme, meta=False), batch(1, 32), None)


def test_documents_in_a_row_are_counted_with_their_masks() -> None:
    ids = batch(2, 48).input_ids
    positions = torch.arange(48).repeat(2, 1) % 24
    rows = Batch(ids, ids, segment_ids=torch.arange(48).repeat(2, 1) // 24, position_ids=positions)
    shape = Rows(batch_size=2, seq_len=48, segments=True)
    meta = student("llama", "W4A16_G32", meta=True)
    trace = trace_forward(meta, shape, wants=PLAIN, autocast=torch.bfloat16, device="cpu")
    counted = trace.size(set().union(*trace.saved.values()))
    assert counted == really_saved(student("llama", "W4A16_G32", meta=False), rows, torch.bfloat16)


def test_attentions_that_a_loss_wants_are_counted() -> None:
    meta, real = student("llama", "W4A16_G32", meta=True), student("llama", "W4A16_G32", meta=False)
    meta.use_eager_attention()
    real.use_eager_attention()
    wants = frozenset({"attentions"})
    trace = trace_forward(meta, Rows(batch_size=2, seq_len=48), wants=wants, autocast=torch.bfloat16, device="cpu")
    counted = trace.size(set().union(*trace.saved.values()))
    assert counted == really_saved(real, batch(2, 48), torch.bfloat16, wants)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_compiled_blocks_keep_what_the_partitioner_keeps(kind: str) -> None:
    real = student(kind, "W4A16_G32", meta=False)
    backend = aot_autograd(
        fw_compiler=nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )  # fmt: skip
    torch._dynamo.reset()
    for block in blocks_of(real.model):
        block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
    measured = really_saved(real, batch(4, 256), torch.bfloat16)
    trace = trace_forward(
        student(kind, "W4A16_G32", meta=True), Rows(batch_size=4, seq_len=256), wants=PLAIN, autocast=torch.bfloat16,
        device="cpu",
    )  # fmt: skip
    kept, _ = count_kept(trace, checkpoint=False, compiled=True)
    assert kept.total == pytest.approx(measured, rel=0.06)


def test_an_unknown_way_to_checkpoint_is_refused() -> None:
    trace = trace_forward(
        student("llama", "W4A16_G32", meta=True),
        Rows(batch_size=1, seq_len=8),
        wants=PLAIN,
        autocast=None,
        device="cpu",
    )
    with pytest.raises(ValueError, match="checkpoint_blocks 'half'"):
        count_kept(trace, checkpoint="half", compiled=False)
