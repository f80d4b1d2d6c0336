"""What is kept between forward and backward under each way to run the blocks, worked out from one eager trace.

nothing     all that autograd saves
full        what is handed to each block; in the backward pass one block's savings at a time
selective   that, and the outputs of matmuls and attention; the rest of one block at a time
compiled    the rule of torch.compile's partitioner as measured: inputs of matmuls and of attention, what attention
            gives, and the matmul outputs from which everything else is computed again (docs/memory.md)
"""

from __future__ import annotations

from dataclasses import dataclass

from kdqat.training.planner.trace import Trace


@dataclass(frozen=True)
class Kept:
    """Bytes by what they are."""

    activations: int
    weight_copies: int  # cast (and fake-quantized) weights
    fake_quantization: int  # made inside fake quantizers, weights' and activations'

    @property
    def total(self) -> int:
        return self.activations + self.weight_copies + self.fake_quantization


def count_kept(trace: Trace, *, checkpoint: bool | str, compiled: bool) -> tuple[Kept, Kept]:
    """(kept from forward to backward, of the largest block what its recomputation adds for a moment).

    Args:
        checkpoint, compiled: `Parallel.checkpoint_blocks` and `Parallel.compile_blocks`.

    Raises:
        ValueError: for an unknown kind of checkpointing.
    """
    if checkpoint not in (False, True, "selective"):
        raise ValueError(f"model.parallel.checkpoint_blocks {checkpoint!r} is unknown: use false, true or selective")
    per_block = {
        block: _saved_compiled(trace, block) if compiled else trace.saved.get(block, set()) for block in trace.inputs
    }
    kept = trace.saved.get(None, set()) | trace.results
    if not checkpoint:
        return _kinds(trace, kept.union(*per_block.values())), Kept(0, 0, 0)
    kept = kept.union(*trace.inputs.values())
    if checkpoint == "selective":
        for block in trace.inputs:
            kept |= (set(trace.matmul_outputs.get(block, ())) | trace.attention.get(block, set())) - trace.static
    again = [_kinds(trace, saved - kept) for saved in per_block.values()]
    return _kinds(trace, kept), max(again, key=lambda k: k.total, default=Kept(0, 0, 0))


def _saved_compiled(trace: Trace, block: int) -> set[int]:
    """What the compiled block keeps.

    Matmuls and attention are never computed twice, and what they read must exist in the backward pass; everything
    between them is. So each other saved tensor is followed back to the matmul outputs and block inputs it comes from.
    """
    saved, inputs = trace.saved.get(block, set()), trace.inputs[block]
    made = set(trace.matmul_outputs.get(block, ())) | trace.attention.get(block, set()) | inputs
    first_cast: dict[object, int] = {}
    kept: set[int] = set()
    todo: list[int] = []
    for number in saved:
        if number in trace.static:
            kept |= set() if number in trace.quantizing else {number}
        elif number in made:
            kept.add(number)
        elif number in trace.matmul_inputs:  # eager casts once a reader, the compiler once
            kept.add(first_cast.setdefault(trace.cast_of.get(number, number), number))
        else:
            todo.append(number)
    seen: set[int] = set()
    while todo:
        number = todo.pop()
        if number in seen or number in trace.static:
            continue
        seen.add(number)
        if number in made or number in kept:
            kept.add(number)
        else:
            todo.extend(trace.parents.get(number, ()))
    return kept


def _kinds(trace: Trace, storages: set[int]) -> Kept:
    quantizing = storages & trace.quantizing
    copies = (storages & trace.static) - quantizing
    return Kept(trace.size(storages - quantizing - copies), trace.size(copies), trace.size(quantizing))
