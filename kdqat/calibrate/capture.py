"""The one full pass: what the model hands to its blocks, so that each can be called again alone.

Causal and sliding-window masks, position ids and rotary cos and sin are made outside the blocks and differ by layer in
some families (Gemma 2 and 3). They are recorded as they come, never rebuilt; of hidden states only the first block's
are kept, the others are computed when their turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.calibrate.block_call import calibrating
from kdqat.models import SplitModel, blocks_of
from kdqat.types import Batch


@dataclass(frozen=True)
class Arguments:
    """How a block was called, its hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, move: Callable[[Tensor], Tensor]) -> Arguments:
        """The same with every tensor moved."""
        return Arguments(_map(self.args, move), _map(self.kwargs, move))


@dataclass
class Captured:
    """What the full pass leaves behind, micro-batch by micro-batch."""

    batches: list[Batch] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)  # [B, T] bool on the CPU, True where there is a token
    hidden: list[Tensor] = field(default_factory=list)  # [B, T, H], the first block's
    arguments: list[list[Arguments]] = field(default_factory=list)  # one for each block


def capture(
    split: SplitModel, batches: Iterable[Batch], *, sequential: bool, store: torch.device, max_tokens: int | None
) -> Captured:
    """Run the model over the text and record how its blocks are called; see `stream_blocks` for the arguments.

    Raises:
        ValueError: if there is no token, or a block is not called exactly once for each micro-batch.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"calibration: max_tokens must be at least 1, not {max_tokens}")
    captured, num_tokens = Captured(), 0
    with calibrating(split, sequential=sequential):
        for batch in batches:
            captured.batches.append(batch)
            captured.masks.append(token_mask(batch))
            hidden, arguments = _record(split, batch, store)
            captured.hidden.append(hidden)
            captured.arguments.append(arguments)
            num_tokens += int(captured.masks[-1].sum())
            if max_tokens is not None and num_tokens >= max_tokens:
                break
    if num_tokens == 0:
        raise ValueError("calibration: there is not one token of text; give batches with text")
    return captured


def token_mask(batch: Batch) -> Tensor:
    """[B, T] bool on the CPU: True where there is a token, False for padding."""
    if batch.attention_mask is None:
        return torch.ones(batch.input_ids.shape, dtype=torch.bool)
    return batch.attention_mask.bool().cpu()


def on_device(batch: Batch, module: nn.Module) -> Batch:
    """`batch` where the module's weights are."""
    device = next(module.parameters()).device
    return Batch(*(part.to(device) if isinstance(part, Tensor) else part for part in batch))  # type: ignore[arg-type]


def _record(split: SplitModel, batch: Batch, store: torch.device) -> tuple[Tensor, list[Arguments]]:
    """One micro-batch: the first block's hidden states, and each block's other arguments."""
    blocks = blocks_of(split.model)
    calls: list[tuple[nn.Module, Arguments]] = []
    hidden: list[Tensor] = []
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # blocks share masks and cos/sin: one copy each

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor, tensor.to(store)
        return moved[id(tensor)][1]

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        states, *rest = args if args else (kwargs.pop("hidden_states"),)
        if not hidden:
            hidden.append(states.to(store))
        calls.append((block, Arguments(tuple(rest), kwargs).to(move)))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(hook, with_kwargs=True))
        split(on_device(batch, split))
    if [id(block) for block, _ in calls] != [id(block) for block in blocks]:
        raise ValueError(f"calibration needs blocks that are called once each, in order; {len(calls)} calls were made "
                         f"of {len(blocks)} blocks")  # fmt: skip
    return hidden[0], [arguments for _, arguments in calls]


def _map(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if type(value) in (tuple, list):
        return type(value)(_map(item, move) for item in value)
    if type(value) is dict:
        return {key: _map(item, move) for key, item in value.items()}
    return value
