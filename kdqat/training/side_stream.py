"""A CUDA stream beside the student's, for the teacher.

The teacher needs nothing of the student: its forward pass may begin while the optimizer still updates the student's
weights (which waits for memory, and leaves the arithmetic units idle), and go on beside the student's own forward pass.
So the batch is copied to the device on this stream, ahead of the queue, and the teacher answers here; the main stream
waits where the loss needs the answer. Numbers do not change. The price is memory that the two streams do not share:
the working set of a teacher's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """The stream, on one CUDA device.

    Args:
        device: where student and teacher are.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside runs on this stream, without waiting for the main one."""
        with torch.cuda.stream(self.stream):
            yield

    def join(self, *values: Any) -> None:
        """Let the main stream wait for what was begun here, and keep the tensors in `values` until it has used them."""
        main = torch.cuda.current_stream(self.stream.device)
        main.wait_stream(self.stream)
        for tensor in tensors_in(values):
            tensor.record_stream(main)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every CUDA tensor inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
