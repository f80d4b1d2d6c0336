"""stream_blocks: the model block by block, each with the inputs that the blocks before it give.

The driver of every method that looks at activations (GPTQ, https://arxiv.org/abs/2210.17323, and all after it). One
full pass records how the blocks are called; then each block is computed alone, and its outputs take the place of its
inputs, so that the activations of one block exist at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from kdqat.calibrate.block_call import BlockCall, calibrating, hidden_of
from kdqat.calibrate.capture import Captured, capture, on_device
from kdqat.calibrate.kept import KeptStatistics
from kdqat.calibrate.visit import visiting
from kdqat.models import SplitModel, block_prefix, blocks_of
from kdqat.types import Batch

CHUNK_TOKENS = 1024  # the head's logits are [tokens, V]: never of a whole micro-batch


def stream_blocks(
    split: SplitModel,
    batches: Iterable[Batch],
    *,
    sequential: bool = False,
    store: torch.device | str = "cpu",
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    kept: KeptStatistics | None = None,
) -> Generator[BlockCall, None, None]:
    """Every block of the model in order, and at last what lies outside the blocks (`lm_head`), ready to be run.

    The model stays where it is, and between two calls it is untouched: mode, hooks and fake quantization are as the
    caller left them. Held are the hidden states of one block, 4*N*T*H bytes for N rows in fp32 (half in bf16), in
    `store`, and once a micro-batch the masks and rotary tables that the model made for it.

    Args:
        split: plain or with fake-quantized layers.
        batches: calibration text on any device; read once.
        sequential: a block gets what the model *as it is now* computes before it, fake quantization and changes made
            during this loop included. False: fake quantization is off, so that blocks get full-precision inputs.
        store: where hidden states, masks and tables wait.
        max_tokens: take no further batch once there are so many tokens; None: take all.
        device: where a block computes in its turn; None: where it is. What lies outside of blocks stays where it is.
        kept: statistics of earlier runs, and a place for those of this one (`BlockCall.gather`); not with `sequential`.

    Yields:
        BlockCall, good until the next one is asked for.

    Raises:
        ValueError: for text without tokens, a model whose blocks are not called once each, in order, and `kept` with
            `sequential`.
    """
    if sequential and kept is not None:
        raise ValueError("what quantized blocks give is of this run alone: keep no statistics, or sequential=False")
    captured = capture(split, batches, sequential=sequential, store=torch.device(store), max_tokens=max_tokens)
    blocks = list(blocks_of(split.model))
    hidden, num_blocks = captured.hidden, len(blocks)
    captured.hidden = []
    console = Console(stderr=True)
    steps = range(num_blocks + 1)
    for i in track(steps, "calibrating", console=console, transient=True, disable=not console.is_terminal):
        call: BlockCall
        with visiting(blocks[i : i + 1], device):
            if i < num_blocks:
                call = _Block(i, split, captured, hidden, sequential=sequential)
            else:
                call = _Outside(split, captured, sequential=sequential)
            call.family, call.kept = split.family, kept
            try:
                yield call
                hidden = call.advance() if isinstance(call, _Block) and i < num_blocks - 1 else []
            finally:
                call.end()


class _Block(BlockCall):
    """A block, on its inputs and the arguments that were recorded for it."""

    def __init__(self, index: int, split: SplitModel, captured: Captured, inputs: list[Tensor], *, sequential: bool):
        prefix = f"{block_prefix(split.model)}{index}"
        super().__init__(index, blocks_of(split.model)[index], prefix, captured.masks, sequential=sequential)
        self.inputs = inputs
        self._arguments = [arguments[index] for arguments in captured.arguments]
        self._device = next(self.module.parameters()).device

    def forward(self, i: int) -> Tensor:
        return self.replay(i)

    def replay(self, i: int, hidden: Tensor | None = None) -> Tensor:
        def here(tensor: Tensor) -> Tensor:
            return tensor.to(self._device)

        arguments = self._arguments[i].to(here)
        states = here(self.inputs[i] if hidden is None else hidden)
        return hidden_of(self.module(states, *arguments.args, **arguments.kwargs))

    def advance(self) -> list[Tensor]:
        """The block's outputs, put in the place of its inputs one by one: there is never a second stream."""
        with calibrating(self.module, sequential=self.sequential):
            for i, hidden in enumerate(self.inputs):
                self.inputs[i] = self.forward(i).to(hidden.device)
        return self.inputs


class _Outside(BlockCall):
    """The whole model once more, so that `lm_head` hears what the blocks, as they are by now, give it.

    Once more, because what stands between the last block and the head is each family's own (norms, projections).
    """

    def __init__(self, split: SplitModel, captured: Captured, *, sequential: bool) -> None:
        super().__init__(None, split.model, "", captured.masks, sequential=sequential)
        self._split, self._batches = split, captured.batches

    def forward(self, i: int) -> None:
        hidden = self._split(on_device(self._batches[i], self._split)).hidden.flatten(0, 1)
        if self._padded is not None:
            hidden, self._padded = hidden[self._padded.flatten().to(hidden.device)], None
        for rows in hidden.split(CHUNK_TOKENS) if self._split.has_head else ():
            self._split.head(rows)
