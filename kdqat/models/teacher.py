"""The teacher: whoever answers `outputs(batch, wants)`. A plain object, not an nn.Module.

`FrozenTeacher` is a second model and answers anything; `CachedTeacher` answered beforehand, `SharedTeacher` is the
student in full precision (docs/teachers.md says which when).

As a submodule it would land in checkpoints and in the optimizer, and `.train()` would switch its dropout on
(docs/architecture.md, decision 8).
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from kdqat.models.cast import cast_model
from kdqat.models.fp8 import settle, to_float8
from kdqat.models.offload import BlockOffload
from kdqat.models.roles import blocks_of
from kdqat.models.source import Dtype, ModelSource
from kdqat.models.split import SplitModel, cut_vocabulary
from kdqat.types import Batch, Outputs, TopKOutputs

log = logging.getLogger(__name__)


class Teacher(ABC):
    """A reference model. `prepare` once, `place` once, then `outputs` for every batch.

    Attributes:
        shares_weights: it computes with the student's latent weights, which must then stay as they were loaded.
        repeats_itself: what it and its layers answered to a batch once is what they will always answer to it, so that
            observers need not ask again. Whoever overrides `outputs` says so anew.
    """

    shares_weights: ClassVar[bool] = False
    repeats_itself: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, source: ModelSource, student: SplitModel, tokenizer: Any, *, pristine: bool) -> None:
        """Load what is needed; a second call does nothing.

        Args:
            source: where the student came from.
            student: the student's model.
            tokenizer: the student's.
            pristine: whether the student's model is still as loaded from `source`, so that a copy is a teacher.
        """

    @abstractmethod
    def place(self, device: torch.device, shard: Callable[[nn.Module], None] | None = None) -> None:
        """Move to `device`, or let `shard` spread the model over ranks."""

    @abstractmethod
    def release(self) -> None:
        """Let the model go; the next `prepare` loads it again. What `shard` spread over ranks is of no use to one."""

    @abstractmethod
    def use_eager_attention(self) -> None:
        """See SplitModel.use_eager_attention."""

    @abstractmethod
    def outputs(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Outputs | TopKOutputs:
        """Answer a batch, without a graph and in the teacher's own arithmetic, whatever autocast the trainer uses (an
        fp16 teacher under bf16 autocast would answer bf16); only a teacher that shares the student's weights follows
        the trainer."""

    def require_answers(self, keys: Callable[[], Sequence[bytes]], wants: frozenset[str]) -> None:  # noqa: B027
        """Check before the first step that there will be an answer to every batch; who computes answers has them all.

        Args:
            keys: lists the row keys of all batches to come; costs a pass over the data, so it is not always called.
            wants: of the loss.

        Raises:
            ValueError: naming what is missing and the remedy.
        """

    def judge(self) -> Teacher:
        """Who answers any text, that of evaluators for one: `prepare` and `place` it as well."""
        return self


class FrozenTeacher(Teacher):
    """A frozen full-precision model in its own dtype.

    Args:
        path: where it comes from, as ModelSource.path; None: the student's own source, copied from memory.
        dtype: of its weights and arithmetic.
        revision, trust_remote_code: as ModelSource.
        compile: torch.compile each block.
        fp8: compute the blocks' linear layers in float8 (`fp8.py`); the head and all else stay in `dtype`.
        offload: keep the blocks in pinned CPU memory and copy them to the GPU one ahead (`offload.py`).

    Raises:
        ValueError: for options that exclude each other.
    """

    repeats_itself: ClassVar[bool] = True

    def __init__(
        self,
        path: str | None = None,
        *,
        dtype: Dtype = "bfloat16",
        revision: str | None = None,
        trust_remote_code: bool = False,
        compile: bool = False,
        fp8: bool = False,
        offload: bool = False,
    ) -> None:
        if fp8 and dtype != "bfloat16":
            raise ValueError(f"FrozenTeacher: fp8 goes with dtype bfloat16, which its kernel writes, not with {dtype}")
        if offload and compile:
            raise ValueError(
                "FrozenTeacher: offload and compile exclude each other: a compiled block cannot wait for its weights"
            )
        self.path = path
        self.dtype = dtype
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.compile, self.fp8, self.offload = compile, fp8, offload
        self.split: SplitModel | None = None
        self._offloaded: BlockOffload | None = None
        self._compiled = False

    def own_source(self, student: ModelSource) -> ModelSource:
        """Where its weights come from, in its dtype; `student` is the student's source."""
        if self.path in (None, student.path) and self.revision in (None, student.revision):
            return replace(student, dtype=self.dtype)
        return ModelSource(self.path or student.path, self.dtype, self.revision, self.trust_remote_code)

    def prepare(self, source: ModelSource, student: SplitModel, tokenizer: Any, *, pristine: bool) -> None:
        if self.split is not None:
            return
        own = self.own_source(source)
        if own.same_weights(source):
            # rounded weights of the student's are no start for a teacher in another dtype
            wide = source if source.dtype in ("float32", self.dtype) else own
            model = copy.deepcopy(student.model) if pristine and wide is source else wide.load_model()
            self.split = SplitModel(cast_model(model, getattr(torch, self.dtype)))
        else:
            self.split = SplitModel(own.load_model())
            cut = cut_vocabulary(student, self.split, lambda: (tokenizer, own.load_tokenizer()))
            if cut:
                log.info(cut)
        self.split.eval().requires_grad_(False)
        if self.fp8:
            to_float8(self.split.model)

    def place(self, device: torch.device, shard: Callable[[nn.Module], None] | None = None) -> None:
        """As `Teacher.place`; a second call changes the device at most.

        Raises:
            ValueError: for offload or fp8 with `shard`, offload where there is no GPU, or to a second one.
        """
        assert self.split is not None, "prepare() comes first"
        blocks = blocks_of(self.split.model)
        if shard is not None and (self.offload or self.fp8):
            option = "offload" if self.offload else "fp8"
            raise ValueError(f"model.teacher.{option} and model.parallel.shard exclude each other; leave one out")
        if self.compile and not self._compiled:  # before sharding, as the student's
            for block in blocks:
                block.compile()
            self._compiled = True
        if shard is not None:
            shard(self.split)
        if self.offload:
            self._offload(blocks, device)
        self.split.to(device)  # of an offloaded model all but the blocks
        settle(self.split.model, device)

    def _offload(self, blocks: list[nn.Module], device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"model.teacher.offload: its blocks would wait in CPU memory for a GPU, and it computes on {device}; "
                "leave offload out"
            )
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if self._offloaded is None:
            self._offloaded = BlockOffload(blocks, device=device)
            log.info("teacher: %.1f GB of blocks wait in CPU memory", self._offloaded.host_bytes / 1e9)
        elif self._offloaded.device != device:
            raise ValueError(f"model.teacher.offload: it computes on {self._offloaded.device}; release() it first")

    def release(self) -> None:
        self.split, self._offloaded, self._compiled = None, None, False

    def use_eager_attention(self) -> None:
        assert self.split is not None, "prepare() comes first"
        self.split.use_eager_attention()

    def outputs(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Outputs:
        assert self.split is not None, "prepare() comes first"
        # no_grad, not inference_mode: KL saves its target for backward
        with torch.no_grad(), torch.autocast(batch.input_ids.device.type, enabled=False):
            return self.split(batch, wants)
