"""Telling transformers that no row holds more than one document.

A causal model of transformers looks for documents packed into one row in every forward pass without a mask, by asking
the device whether positions restart (`masking_utils.find_packed_sequence_indices`): the CPU waits there until the GPU
has done everything before, and launches nothing meanwhile. Positions that the model counts itself never restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import masking_utils

_NAME = "find_packed_sequence_indices"


@contextmanager
def counted_by_the_model() -> Iterator[None]:
    """Inside, a forward pass without `position_ids` and `attention_mask` does not wait for the device to find no packed
    documents; the answer is the same. A transformers without that function looks as it likes."""
    module: Any = masking_utils
    asks = getattr(module, _NAME, None)
    if asks is None:
        yield
        return
    setattr(module, _NAME, _none_packed)
    try:
        yield
    finally:
        setattr(module, _NAME, asks)


def _none_packed(position_ids: Tensor) -> None:
    """What transformers finds for positions 0, 1, 2 ..."""
