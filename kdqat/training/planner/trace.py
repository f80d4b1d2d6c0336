"""What autograd keeps of one forward pass, counted and not guessed: the student runs on tensors without memory.

`FakeTensorMode` computes shapes, dtypes and views of every operation and allocates nothing. Hooks see each tensor that
autograd saves for the backward pass; two saved tensors of one storage count once, parameters not at all. A dispatch
mode notes beside it which operation made a storage, in which block, and from what, so that checkpointing and compiling
can be worked out from the same trace (`activations.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdqat.models import SplitModel, blocks_of
from kdqat.models.tracing import one_document
from kdqat.quant import FakeQuantizer
from kdqat.types import Batch, Outputs

_ATEN = torch.ops.aten
_MATMULS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}


@dataclass
class Trace:
    """Storages of one forward pass, by number. Block None is what lies outside of the blocks."""

    nbytes: dict[int, int] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)  # parameters and buffers
    saved: dict[int | None, set[int]] = field(default_factory=dict)  # by the block that saves it
    inputs: dict[int, set[int]] = field(default_factory=dict)  # what is handed to each block
    results: set[int] = field(default_factory=set)  # what the loss gets
    judged: set[int] = field(default_factory=set)  # saved by losses that are not on logits
    static: set[int] = field(default_factory=set)  # made of parameters alone
    quantizing: set[int] = field(default_factory=set)  # made inside a fake quantizer
    parents: dict[int, list[int]] = field(default_factory=dict)  # what a storage was computed from
    matmul_inputs: set[int] = field(default_factory=set)
    matmul_outputs: dict[int | None, list[int]] = field(default_factory=dict)  # in order, by block
    attention: dict[int | None, set[int]] = field(default_factory=dict)  # outputs of fused attention
    cast_of: dict[int, tuple[int, torch.dtype]] = field(default_factory=dict)

    @property
    def made(self) -> int:
        """Bytes of all tensors that the forward pass makes."""
        return sum(self.nbytes.values()) - self.size(self.given)

    def size(self, storages: set[int]) -> int:
        """Bytes of the storages."""
        return sum(self.nbytes[storage] for storage in storages)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The shape of a micro-batch: rows, tokens in a row, and whether it has segments or padding."""

    batch_size: int
    seq_len: int
    segments: bool = False
    padding: bool = False


def trace_forward(
    split: SplitModel,
    rows: Rows,
    *,
    wants: frozenset[str],
    autocast: torch.dtype | None,
    device: str,
    judge: Callable[[Outputs, Batch], Any] | None = None,
) -> Trace:
    """Run `split`, which is on the meta device and in training mode, once on `rows`.

    Args:
        wants: as SplitModel.
        autocast: dtype of the forward pass; None: no autocast.
        device: "cuda" or "cpu": whose kernels, and thereby what attention keeps.
        judge: called with the answer, for what losses on hidden states save.

    Raises:
        ValueError: if the model looks at values, which there are none of.
    """
    trace = Trace()
    with fake_run(split, device, autocast, rows) as (fakes, batch), ExitStack() as stack:
        recorder = _Recorder(trace, fakes, num_experts(split))
        _watch_modules(split, recorder, stack)
        stack.enter_context(recorder)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda tensor: tensor))
        answer = functional_call(split, fakes, (batch, wants))
        if judge is not None:
            recorder.experts = 1  # from here on, what is not zero are target positions: all of them
            before = set().union(*trace.saved.values())
            judge(answer, batch)
            trace.judged = trace.saved.get(None, set()) - before
        trace.results = {recorder.number(t) for t in tree_leaves((answer.hidden, dict(answer.extras)))}
    return trace


@contextmanager
def fake_run(
    split: SplitModel, device: str, autocast: torch.dtype | None, rows: Rows
) -> Iterator[tuple[dict[str, Tensor], Batch]]:
    """Parameters, buffers and a batch without memory, and the modes to compute with them."""
    modes: list[Any] = [one_document()] if not rows.segments else []
    modes += [torch.autocast(device, autocast)] if autocast is not None else []
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for mode in modes:
            stack.enter_context(mode)
        made: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                made[id(tensor)] = empty.requires_grad_(tensor.requires_grad)
            return made[id(tensor)]

        everything = [*split.named_parameters(remove_duplicate=False), *split.named_buffers(remove_duplicate=False)]
        ids = torch.zeros((rows.batch_size, rows.seq_len), dtype=torch.long, device=device)
        batch = Batch(
            ids,
            ids,
            attention_mask=torch.ones_like(ids) if rows.padding else None,
            segment_ids=torch.zeros_like(ids) if rows.segments else None,
            position_ids=torch.zeros_like(ids) if rows.segments else None,
        )
        try:
            yield {name: fake(tensor) for name, tensor in everything}, batch
        except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
            kind = split.model.config.model_type  # type: ignore[union-attr]
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"model type {kind!r}: its memory cannot be planned, because its forward pass does not run on tensors "
                f"without values ({reason}); the run itself is not affected"
            ) from error


class _Recorder(TorchDispatchMode):
    """Notes every storage that is made, and what autograd saves."""

    def __init__(self, trace: Trace, fakes: dict[str, Tensor], experts: int) -> None:
        super().__init__()
        self.trace, self.experts = trace, experts
        self.block: int | None = None
        self.depth = 0  # of fake quantizers
        self.alive: dict[int, Any] = {}  # storages, kept so that no number is given twice
        trace.given = {self.number(tensor) for tensor in fakes.values()}
        trace.static |= trace.given

    def number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        number = int(storage._cdata)
        if number not in self.alive:
            self.alive[number] = storage
            self.trace.nbytes[number] = int(storage.nbytes())
        return number

    def save(self, tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and (number := self.number(tensor)) not in self.trace.given:
            self.trace.saved.setdefault(self.block, set()).add(number)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.nonzero.default:  # which tokens an expert gets: an equal share
            return args[0].new_empty((args[0].numel() // self.experts, args[0].dim()), dtype=torch.long)
        given = [self.number(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [self.number(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        self._note(func, given, [number for number in made if number not in given], result)
        return result

    def _note(self, func: Any, given: list[int], new: list[int], result: Any) -> None:
        trace, packet = self.trace, func.overloadpacket
        if given and all(number in trace.static for number in given):
            trace.static.update(new)
        for number in new:
            trace.parents[number] = given
        if self.depth:
            trace.quantizing.update(new)
        if packet in _MATMULS:
            trace.matmul_inputs.update(given)
            trace.matmul_outputs.setdefault(self.block, []).extend(new)
        elif "scaled_dot_product" in packet.__name__:
            trace.matmul_inputs.update(given)
            trace.attention.setdefault(self.block, set()).update(new)
        elif packet is _ATEN._to_copy and new:
            trace.cast_of[new[0]] = (given[0], result.dtype)


def _watch_modules(split: SplitModel, recorder: _Recorder, stack: ExitStack) -> None:
    """Tell the recorder when a block or a fake quantizer begins and ends."""

    def enter_block(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            recorder.block = index
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            recorder.trace.inputs[index] = {recorder.number(t) for t in tensors} - recorder.trace.static

        return hook

    def leave_block(*_: Any) -> None:
        recorder.block = None

    def enter_quantizer(*_: Any) -> None:
        recorder.depth += 1

    def leave_quantizer(module: nn.Module, args: Any, output: Tensor) -> None:
        recorder.depth -= 1
        recorder.trace.quantizing.discard(recorder.number(output))  # what the layer computes with

    for index, block in enumerate(blocks_of(split.model)):
        stack.enter_context(_removed(block.register_forward_pre_hook(enter_block(index), with_kwargs=True)))
        stack.enter_context(_removed(block.register_forward_hook(leave_block)))
    for module in split.modules():
        if isinstance(module, FakeQuantizer):
            stack.enter_context(_removed(module.register_forward_pre_hook(enter_quantizer)))
            stack.enter_context(_removed(module.register_forward_hook(leave_quantizer)))


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def num_experts(split: SplitModel) -> int:
    """Experts in a block; 1 for a dense model."""
    config = split.model.config
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1)
