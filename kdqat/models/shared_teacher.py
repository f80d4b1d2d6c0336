"""The student as its own teacher: its latent weights with fake quantization switched off, and no second model.

It is the full-precision model only while the latent weights are the source's, so it goes with training that leaves them
alone: `trainable: scales` (PEQA, https://arxiv.org/abs/2305.14152, and the end-to-end phase of EfficientQAT,
https://arxiv.org/abs/2407.11062, train nothing else). `KDQATModule` refuses it otherwise.

Unlike a FrozenTeacher it follows the trainer's autocast. Its weights are the fp32 latent ones, and without autocast its
forward pass would run in fp32: several times slower than the student's, for logits that the student, under autocast,
could not follow to that precision. With precision 32-true it answers as FrozenTeacher(dtype="float32") does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdqat.models.source import ModelSource
from kdqat.models.split import SplitModel
from kdqat.models.teacher import Teacher
from kdqat.quant import full_precision
from kdqat.types import Batch, Outputs


class SharedTeacher(Teacher):
    """The student in full precision and evaluation mode; needs `trainable: scales` and weights as they were loaded.

    A student whose weights were trained before teaches what it became, not what its source was.
    """

    shares_weights: ClassVar[bool] = True

    def __init__(self) -> None:
        self.split: SplitModel | None = None

    def prepare(self, source: ModelSource, student: SplitModel, tokenizer: Any, *, pristine: bool) -> None:
        if self.split is None:
            self.split = student

    def place(self, device: torch.device, shard: Callable[[nn.Module], None] | None = None) -> None:
        assert self.split is not None, "prepare() comes first"
        if shard is None:  # else the student is spread over the ranks already
            self.split.to(device)

    def release(self) -> None:
        self.split = None

    def use_eager_attention(self) -> None:
        assert self.split is not None, "prepare() comes first"
        self.split.use_eager_attention()

    def outputs(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Outputs:
        """Answer a batch, without a graph; the head, called later, switches fake quantization off for itself."""
        assert self.split is not None, "prepare() comes first"
        with _as_teacher(self.split):
            answer = self.split(batch, wants)
        return answer._replace(head=_taught(self.split, batch.input_ids.device.type), projection=None)


def _taught(split: SplitModel, device: str) -> Callable[[Tensor], Tensor]:
    """The head as the teacher calls it: under the autocast that holds now, which a loss switches off around it."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def taught(hidden: Tensor) -> Tensor:
        # no cache: a weight cast here, without a graph, would reach the student's head
        with _as_teacher(split), torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            return split.head(hidden)

    return taught


@contextmanager
def _as_teacher(split: SplitModel) -> Iterator[None]:
    """No graph, no fake quantization, no dropout; every module is left in the mode it was in."""
    training = [module for module in split.modules() if module.training]
    for module in training:
        module.training = False  # not .eval(), which would be a call for each module's children again
    try:
        with torch.no_grad(), full_precision(split):
            yield
    finally:
        for module in training:
            module.training = True
