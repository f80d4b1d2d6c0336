"""Where transformers waits for the device in a forward pass, and how not to.

The CPU waits there until the GPU has done everything before, and launches nothing meanwhile.

A causal model looks for documents packed into one row whenever it has no mask, by asking the device whether positions
restart (`masking_utils.find_packed_sequence_indices`); positions that the model counts itself never restart. The mask
of eager attention takes a zero made on the CPU in transformers 5.20 and before, not in 5.23: `eager_masks_made_there`
can go when kdqat needs that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
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


@contextmanager
def eager_masks_made_there() -> Iterator[None]:
    """Inside, the masks of eager attention are made on the device altogether; they are the same."""
    masks: Any = getattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    own: Any = getattr(masking_utils, "eager_mask", None)
    if masks is None or masks["eager"] is not own or not _waits(own):  # somebody's own, or fine as is
        yield
        return
    masks["eager"] = _eager_mask
    try:
        yield
    finally:
        del masks["eager"]  # transformers' own shows again


@lru_cache(maxsize=1)
def _waits(eager_mask: Callable[..., Any]) -> bool:
    return "torch.tensor(" in inspect.getsource(eager_mask)


def _eager_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """transformers' `eager_mask`: 0 where its boolean mask says attend, else the least number of `dtype`."""
    kwargs = {"allow_is_bidirectional_skip": False, **kwargs, "allow_is_causal_skip": False}
    mask = masking_utils.sdpa_mask(*args, **kwargs)
    if mask is None:
        return None
    return torch.where(mask, torch.zeros((), device=mask.device, dtype=dtype), torch.finfo(dtype).min)
