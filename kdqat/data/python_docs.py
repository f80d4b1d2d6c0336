"""Training text without a network: the documentation inside every Python."""

from __future__ import annotations

from kdqat.data.text import PackedText


class PythonDocs(PackedText):
    """`PackedText` on "python_docs:train", validated on "python_docs:heldout"; see `kdqat.data.corpora`.

    Args:
        seq_len, batch_size, shuffle_seed, val_rows: see `TextData`.
    """

    def __init__(self, *, seq_len: int = 1024, batch_size: int = 4, shuffle_seed: int = 0, val_rows: int = 16) -> None:
        super().__init__(
            "python_docs:train",
            val_text="python_docs:heldout",
            seq_len=seq_len,
            batch_size=batch_size,
            shuffle_seed=shuffle_seed,
            val_rows=val_rows,
        )
