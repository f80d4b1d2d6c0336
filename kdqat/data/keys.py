"""Row keys: what a model sees of a row, as a digest. A cached teacher finds its answers by them.

A key depends on the row alone: ids, mask, segments and positions, or that there are none. Batches, order, seeds and
ranks leave it as it is; another `seq_len`, packing, text or tokenizer makes other rows and so other keys. Labels are
not in it, because no model sees them.
"""

from __future__ import annotations

import hashlib

import numpy as np

from kdqat.types import Batch

KEY_BYTES = 16
_SEEN = ("input_ids", "attention_mask", "segment_ids", "position_ids")


def row_keys(batch: Batch) -> tuple[bytes, ...]:
    """A key of KEY_BYTES bytes for each row of `batch`, whose tensors are on the CPU."""
    parts = {name: tensor for name in _SEEN if (tensor := getattr(batch, name)) is not None}
    arrays = [np.ascontiguousarray(tensor.numpy(), dtype="<i4") for tensor in parts.values()]
    head = f"{','.join(parts)}:{batch.input_ids.shape[1]};".encode()  # what is absent must not read as something else
    keys = []
    for row in range(len(batch.input_ids)):
        digest = hashlib.blake2b(head, digest_size=KEY_BYTES)
        for array in arrays:
            digest.update(array[row])
        keys.append(digest.digest())
    return tuple(keys)
