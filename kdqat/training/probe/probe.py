"""The probe of a run: one small batch, and a pass of teacher and student over it whenever somebody wants to look.

The batch is a corner of the first batch of the process of rank 0 (`batch.py`), the same on every rank and after a
resume (whoever asked for the probe keeps it in its state), so that every rank computes the same numbers and nothing is
reduced. `passes.py` has the pass itself.

Memory, until the pass is let go: outputs of all layers and blocks of both models, in the dtype they have
(Llama-2-7B: 24 MB a block in 16 bits at 256 tokens, 1.5 GB for both), with gradients the inputs as well, the
fake-quantized weight of every layer in the dtype of the forward pass (as a training step without checkpointing holds
them), and a few fp32 tensors [tokens, vocabulary]. A teacher that repeats itself is asked once: its answer stays, with
its half of the outputs where somebody compares them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kdqat.losses import DistillLoss
from kdqat.losses.select import remember_positions
from kdqat.models import SplitModel, Teacher
from kdqat.training.probe.batch import cut, real_positions
from kdqat.training.probe.capture import Seen
from kdqat.training.probe.passes import Answered, Context, ProbePass, live_split, probe_pass
from kdqat.types import Batch, LayerRef


class Probe:
    """Teacher and student on one batch.

    Args:
        num_rows, num_tokens: of the batch, at most.

    Attributes:
        batch: None until `offer`.
        positions: [n] indices of its tokens among B * T, without padding; None: all of them.
        attention: somebody wants attention weights, which takes eager attention.
        compares: somebody wants what the teacher's layers answered; else it is not kept.
        gradient_steps: at multiples of these steps gradients are wanted.
    """

    def __init__(self, num_rows: int, num_tokens: int) -> None:
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.batch: Batch | None = None
        self.positions: Tensor | None = None
        self.attention = self.compares = False
        self.cross_entropy = False
        self.gradient_steps: set[int] = set()
        self._pass: tuple[int, ProbePass] | None = None
        self._paused = False  # the garbage collector, by this probe
        self._names: list[str] | None = None
        self._answered: tuple[Any, Answered] | None = None  # who was asked for what, and what it says each time

    def offer(self, batch: Batch, share: Callable[[Any], Any]) -> None:
        """Cut the probe's batch from a training batch, unless there is one.

        Args:
            share: gives every rank what rank 0 has; collective.
        """
        if self.batch is None:
            self.take(share(_on_cpu(cut(batch, self.num_rows, self.num_tokens))))
            assert self.batch is not None
        if self.batch.input_ids.device != batch.input_ids.device:
            self._keep(move_data_to_device(self.batch, batch.input_ids.device))

    def take(self, state: list[Tensor | None]) -> None:
        """Take over a batch as `state` gave it."""
        tensors: Any = state
        self._keep(Batch(*tensors))

    def _keep(self, batch: Batch) -> None:
        self.batch, self._answered = batch, None
        remember_positions(batch)  # while the device has nothing to do
        self.positions = real_positions(batch)

    def state(self) -> list[Tensor | None] | None:
        """The batch, for a checkpoint."""
        return None if self.batch is None else _on_cpu(self.batch)

    def at(
        self,
        step: int,
        student: SplitModel,
        layers: Callable[[], Sequence[LayerRef]],
        *,
        teacher: Teacher | None,
        loss: DistillLoss | None,
        context: Context,
    ) -> ProbePass:
        """The pass of `step`: made once, whoever asks; arguments as `probe_pass`. `layers` are asked for once, and so
        is a teacher that repeats itself."""
        if self._pass is not None and self._pass[0] == step:
            return self._pass[1]
        assert self.batch is not None
        # thousands of tensors that all go at once, by `forget`: counted as new objects they would have Python look for
        # garbage among all that there are, for 0.1 s and more
        self._paused = self._paused or gc.isenabled()
        gc.disable()
        try:
            self._names = [ref.name for ref in layers()] if self._names is None else self._names
            asked = teacher, loss, self.attention
            known = self._answered[1] if self._answered is not None and self._answered[0] == asked else None
            found = probe_pass(
                student,
                self.batch,
                self._names,
                teacher=teacher,
                loss=loss,
                context=context,
                attention=self.attention,
                gradients=any(step % every == 0 for every in self.gradient_steps),
                cross_entropy=self.cross_entropy,
                answered=known,
            )
            if found.answered is not None and _repeats_itself(teacher):
                seen = found.answered.seen if self.compares else Seen({}, {}, {})
                self._answered = asked, found.answered._replace(seen=seen)
        except BaseException:
            self.forget()
            raise
        self._pass = step, found
        return found

    def forget(self) -> None:
        """Let the last pass go."""
        self._pass = None
        if self._paused:
            gc.enable()
        self._paused = False

    def let_go(self) -> None:
        """Let go of everything that belongs to a student and a teacher; the batch stays."""
        self.forget()
        self._names = self._answered = None


def _repeats_itself(teacher: Teacher | None) -> bool:
    """What its class says that defines its answers, or one made of that.

    Never where FSDP2 shards it: the loss calls its head, whose weight is gathered by a forward pass.
    """
    for kind in type(teacher).__mro__:
        if "repeats_itself" in vars(kind):
            sharded = isinstance(live_split(teacher, "the probe"), FSDPModule)
            return bool(vars(kind)["repeats_itself"]) and not sharded
        if "outputs" in vars(kind):
            return False
    return False


def _on_cpu(batch: Batch) -> list[Tensor | None]:
    """Its tensors; row keys are a cached teacher's affair."""
    return [None if tensor is None else tensor.cpu() for tensor in batch[:5]]
