"""What a model must be told when it runs on tensors without values.

transformers reads document boundaries off restarting position ids, and where it cannot read values it prepares for the
worst: a mask [T, T], and attention that copies keys and values for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import masking_utils


@contextmanager
def one_document() -> Iterator[None]:
    """Inside the block every row counts as one document, whatever its position ids are."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
