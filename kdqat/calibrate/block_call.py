"""BlockCall: one block, its inputs for the whole calibration text, and a way to hear the layers inside.

The block is run on these inputs as often as a method likes, with listeners on its layers. A listener gets what a
layer sees as [tokens, I] without padding, one micro-batch after the other, so that nothing has to hold all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.calibrate.kept import KeptStatistics
from kdqat.calibrate.statistics import InputSample, Statistic
from kdqat.models.roles import Family
from kdqat.quant import FakeQuantExperts, full_precision

Listener = Callable[[Tensor], None]


class BlockCall(ABC):
    """What is calibrated now: a block, or at the end what lies outside the blocks. `stream_blocks` makes it.

    Attributes:
        index: of the block; None outside the blocks.
        module: the block; outside the blocks the Hugging Face model.
        prefix: the block's full name, e.g. "model.layers.3"; outside the blocks "".
        sequential: the model computes as it is now; False: with fake quantization switched off.
        inputs: the block's hidden states [B, T, H], one tensor a micro-batch, where the stream keeps them. Empty
            outside the blocks, and once the next call has been asked for.
        family: of the model; None where a caller made this call without one.
        kept: where statistics lie that `gather` need not count again; None: nowhere.
    """

    family: Family | None = None
    kept: KeptStatistics | None = None

    def __init__(
        self, index: int | None, module: nn.Module, prefix: str, masks: Sequence[Tensor], *, sequential: bool
    ) -> None:
        self.index, self.module, self.prefix, self.sequential = index, module, prefix, sequential
        self.inputs: list[Tensor] = []
        self.num_tokens = sum(int(mask.sum()) for mask in masks)  # of the whole text, without padding
        self._masks = masks  # [B, T] bool each, True where there is a token
        self._padded: Tensor | None = None  # the mask of the micro-batch that runs now, if it has padding
        self._over = False

    @abstractmethod
    def forward(self, i: int) -> Any:
        """Compute micro-batch `i`; called inside `calibrating`."""

    def replay(self, i: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output [B, T, H] for micro-batch `i`, with gradients and fake quantization as the caller has
        them; for methods that learn on a block. They see to eval mode themselves (`kdqat.calibrate.calibrating`).

        Args:
            hidden: [B, T, H] in the place of `inputs[i]`, e.g. what the full-precision model gives there.

        Raises:
            ValueError: outside the blocks, where there is no such output.
        """
        raise ValueError("what lies outside the blocks cannot be replayed: it has no hidden states of its own")

    def tokens(self, i: int, hidden: Tensor) -> Tensor:
        """`hidden` [B, T, H] of micro-batch `i` as [tokens, H], without padding."""
        return hidden[self._masks[i].to(hidden.device)]

    def run(
        self, on_input: Mapping[str, Listener] | None = None, on_output: Mapping[str, Listener] | None = None
    ) -> None:
        """Compute all micro-batches, in eval mode and without a graph; layers are heard on the way.

        With `sequential` the block's own layers are fake-quantized while they are heard; a method that wants them
        in full precision, on what the quantized blocks before them give (GPTQ), runs inside
        `full_precision(call.module)`.

        Args:
            on_input: full layer name -> what is called with the layer's input [tokens, I] of every micro-batch.
            on_output: likewise with its output [tokens, O]; the block as a whole is the layer named `prefix`.

        Raises:
            ValueError: for a name that is not in this block, a layer in which padding cannot be told from text, or a
                call whose inputs are gone.
        """
        if self._over:
            what = f"block {self.prefix}" if self.prefix else "what lies outside the blocks"
            raise ValueError(
                f"{what}: its inputs are gone, for the next BlockCall was asked for or the stream closed; use each "
                "BlockCall inside the loop over stream_blocks"
            )
        layers = self._layers([*(on_input or {}), *(on_output or {})])
        with ExitStack() as stack:
            for name, listener in (on_input or {}).items():
                hook = self._input_hook(name, listener)
                stack.enter_context(layers[name].register_forward_pre_hook(hook, with_kwargs=True))
            for name, listener in (on_output or {}).items():
                stack.enter_context(layers[name].register_forward_hook(self._output_hook(name, listener)))
            stack.enter_context(calibrating(self.module, sequential=self.sequential))
            for i, mask in enumerate(self._masks):
                self._padded = None if mask.all() else mask
                self.forward(i)

    def gather(self, statistics: Mapping[str, Sequence[Statistic]]) -> None:
        """Have statistics count the inputs of layers: by `run`, or from what an earlier run has `kept`.

        Args:
            statistics: full layer name -> those of its input, nothing counted yet.

        Raises:
            ValueError: as `run`; for kept statistics of another model, dtype or text.
        """
        device = next(self.module.parameters()).device
        if self.kept is not None and self.kept.fill(self.prefix, statistics, device):
            return
        self.run(on_input={name: _all_of(several) for name, several in statistics.items()})
        if self.kept is not None:
            self.kept.add(self.prefix, statistics)

    def end(self) -> None:
        """Let go of the inputs; `run` refuses from now on."""
        self._over, self.inputs = True, []

    def _layers(self, names: Sequence[str]) -> dict[str, nn.Module]:
        inside = dict(self.module.named_modules(prefix=self.prefix))
        for name in names:
            owner = inside.get(name.rpartition(".")[0], self.module)
            if name not in inside and FakeQuantExperts.wraps(owner):
                raise ValueError(
                    f"layer {name!r} is one weight of fused experts, whose inputs cannot be heard; give experts "
                    "dynamic activation ranges and a data-free initializer, or leave them out of the plan"
                )
            if name not in inside:
                where = f"block {self.prefix}" if self.prefix else "the model"
                raise ValueError(f"layer {name!r} is not in {where}; give full names of layers that are")
            if isinstance(inside[name], nn.Embedding):
                raise ValueError(f"layer {name!r} is an embedding, a lookup: it has no inputs to calibrate on")
        return inside

    def _input_hook(self, name: str, listener: Listener) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            if x is None:
                raise ValueError(f"layer {name!r} is not called with hidden states; name the layers inside it")
            listener(self._tokens(x, name))

        return hook

    def _output_hook(self, name: str, listener: Listener) -> Callable[..., None]:
        return lambda module, args, answer: listener(self._tokens(hidden_of(answer), name))

    def _tokens(self, x: Tensor, name: str) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._padded is None:
            return rows
        if len(rows) == len(self._padded):  # a pooler: the first token of every row
            return rows
        if len(rows) != self._padded.numel():  # a layer that sees some of the tokens, such as an expert
            raise ValueError(
                f"layer {name}: sees {len(rows)} rows of a micro-batch of {self._padded.numel()}, so padding cannot be "
                "told from text; calibrate on packed text, which has no padding"
            )
        return rows[self._padded.flatten().to(rows.device)]


def _all_of(statistics: Sequence[Statistic]) -> Listener:
    def listen(x: Tensor) -> None:
        for statistic in statistics:
            statistic.update(x)

    return listen


def layer_inputs(call: BlockCall, names: Sequence[str], *, max_tokens: int) -> dict[str, Tensor]:
    """The inputs of some layers, chosen evenly over the text: name -> [tokens, I] fp32, on the layer's device.

    Args:
        names: full names of layers of this block.
        max_tokens: at most so many rows a layer.

    Raises:
        ValueError: as `BlockCall.run`; for a layer that saw no token, naming it.
    """
    samples = {name: InputSample(max_tokens, call.num_tokens) for name in names}
    call.run(on_input={name: sample.update for name, sample in samples.items()})
    inputs = {}
    for name, sample in samples.items():
        try:
            inputs[name] = sample.rows
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    return inputs


@contextmanager
def calibrating(module: nn.Module, *, sequential: bool) -> Iterator[None]:
    """Eval mode, no graph and, unless `sequential`, full precision; afterwards every submodule is as it was."""
    training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        with torch.no_grad(), nullcontext() if sequential else full_precision(module):
            yield
    finally:
        for m in training:
            m.training = True


def hidden_of(answer: Any) -> Tensor:
    """The hidden states in what a block returned: some families give a tuple."""
    hidden: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return hidden
