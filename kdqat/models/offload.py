"""A frozen model larger than the device: its blocks wait in pinned CPU memory and are copied over one block ahead.

The device has room for two blocks. While one computes, the next is copied into the other room on a stream of its own;
the order of events is

    before block i:      compute waits for the copy of i; the copy of i + 1 waits for all compute queued so far
    after the last one:  the copy of block 0, likewise, for the next batch

"All compute queued so far" ends with block i - 1, the last user of the room that i + 1 is copied into. A block that is
called out of turn is copied when it is called: slower, and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ALIGNMENT = 256  # bytes; what CUDA's own allocations have


class Copier(Protocol):
    """How a block travels. `CudaCopier` is the real one."""

    def start(self, room: Tensor, host: Tensor) -> Any:
        """Begin to copy `host` into `room` once all compute queued so far is done; returns a ticket."""

    def wait(self, ticket: Any) -> None:
        """Let what is queued from now on wait for that copy; the caller goes on."""


class CudaCopier:
    """Copies on a stream of its own; nobody but the GPU waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, room: Tensor, host: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            room[: host.numel()].copy_(host, non_blocking=True)
            room.record_stream(self.stream)  # the room may be freed while the last copy is on its way
        return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)


class BlockOffload:
    """Keeps the parameters of `blocks` on the CPU; hooks bring them to the device when they are needed.

    Parameters become views into the two rooms, block i into room i % 2, for good: a parameter holds its block's numbers
    only while its block computes.

    Args:
        blocks: in the order in which they compute.
        device: where they compute.
        copier: None: a CudaCopier.
        pin: keep the CPU copies in pinned memory, without which a copy is not asynchronous.

    Raises:
        ValueError: if two blocks share a parameter, which then has no one block to travel with.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, device: torch.device, copier: Copier | None = None, pin: bool = True
    ) -> None:
        owned = [id(parameter) for block in blocks for parameter in block.parameters()]
        if len(set(owned)) < len(owned):
            raise ValueError("teacher offload: two blocks of this model share a parameter; leave offload out")
        self.device = device
        self.copier = copier if copier is not None else CudaCopier(device)
        self._hosts = [_packed(block, pin) for block in blocks]
        size = max(host.numel() for host in self._hosts)
        self._rooms = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(blocks)))]
        self._held: list[int | None] = [None] * len(self._rooms)
        self._tickets: list[Any] = [None] * len(self._rooms)
        self._handles = []
        for index, block in enumerate(blocks):
            _place(block, self._rooms[index % 2])
            self._handles.append(block.register_forward_pre_hook(self._before(index)))
        self._handles.append(blocks[-1].register_forward_hook(self._after_the_last))

    @property
    def host_bytes(self) -> int:
        """What waits on the CPU."""
        return sum(host.numel() for host in self._hosts)

    def _fetch(self, index: int) -> None:
        room = index % 2
        if self._held[room] != index:
            self._held[room] = index
            self._tickets[room] = self.copier.start(self._rooms[room], self._hosts[index])

    def _before(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self._fetch(index)
            self.copier.wait(self._tickets[index % 2])
            if index + 1 < len(self._hosts):
                self._fetch(index + 1)

        return hook

    def _after_the_last(self, *_: Any) -> None:
        self._fetch(0)


def _layout(block: nn.Module) -> tuple[list[tuple[nn.Parameter, int]], int]:
    """(each parameter of the block with the byte at which it begins, bytes in all)."""
    places, end = [], 0
    for parameter in block.parameters():  # names a tied one once
        places.append((parameter, end))
        size = parameter.numel() * parameter.element_size()
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _packed(block: nn.Module, pin: bool) -> Tensor:
    """The block's parameters in one CPU buffer, which becomes their memory."""
    places, size = _layout(block)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for parameter, start in places:
        view = _view(host, parameter, start)
        view.copy_(parameter.detach())
        parameter.data = view  # frees what it had before the next block is packed
    return host


def _place(block: nn.Module, room: Tensor) -> None:
    for parameter, start in _layout(block)[0]:
        parameter.data = _view(room, parameter, start)


def _view(buffer: Tensor, parameter: Tensor, start: int) -> Tensor:
    """The part of a byte buffer that holds `parameter`, in its dtype and shape."""
    size = parameter.numel() * parameter.element_size()
    return buffer[start : start + size].view(parameter.dtype).view(parameter.shape)
