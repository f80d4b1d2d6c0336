"""The most that exists at one time while some operations run: their working set.

A tensor counts from the operation that makes it until Python and autograd let its storage go, which is when an
allocator would have it back.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages made inside the block.

    Args:
        experts: of a mixture of experts; each gets an equal share of the tokens.

    Attributes:
        now, peak: bytes.
        made: bytes of all that was made.
    """

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.experts = experts
        self.now = self.peak = self.made = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and self.experts > 1:
            return args[0].new_empty((args[0].numel() // self.experts, args[0].dim()), dtype=torch.long)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[number]

        self._known[number] = weakref.ref(storage, gone)
        self.now += size
        self.made += size
        self.peak = max(self.peak, self.now)
