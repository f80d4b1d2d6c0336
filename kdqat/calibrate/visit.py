"""Modules that compute elsewhere for a while: block by block, a model larger than a GPU is quantized on that GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device | str | None) -> Iterator[None]:
    """Inside, `modules` are on `device` (None: where they are); afterwards where they were, with what changed in them.

    Tied weights go and come back together.
    """
    homes: list[tuple[nn.Module, torch.device]] = []
    try:
        for module in modules if device is not None else ():
            first = next(module.parameters(), None)
            if first is not None:
                homes.append((module, first.device))
                module.to(device)
        yield
    finally:
        for module, home in reversed(homes):
            module.to(home)
