"""Calibration text: a few rows of it, far apart, as micro-batches. 128 rows of 2048 tokens are the custom (GPTQ)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from kdqat.calibrate.ranges import RangeMethod
from kdqat.data import Texts, TextSource, windows
from kdqat.data.sentences import padded, read_sentences
from kdqat.types import Batch


def calibration_batches(
    text: Texts,
    tokenizer: Any,
    *,
    seq_len: int = 2048,
    num_rows: int = 128,
    batch_size: int = 4,
    seed: int | None = None,
) -> list[Batch]:
    """`num_rows` windows of a text, packed like training rows, so that nothing is padded.

    With a tokenizer that has no EOS (sentence encoders) a row is a sentence of the text instead, padded in its batch.

    Args:
        text: what to calibrate on; see `kdqat.data.texts`. Never what is evaluated on.
        tokenizer: the model's.
        seq_len: tokens in a row.
        num_rows: rows in all.
        batch_size: rows in a micro-batch; the last one may be smaller.
        seed: draw the windows at random; None: evenly over the text.

    Raises:
        ValueError: for numbers below 1, or a text with too few windows.
    """
    if min(seq_len, num_rows, batch_size) < 1:
        raise ValueError(
            f"calibration needs seq_len, num_rows and batch_size >= 1, not {seq_len}, {num_rows} and {batch_size}"
        )
    if tokenizer.eos_token_id is None:  # a sentence encoder: documents cannot be laid end to end
        return _sentence_batches(text, tokenizer, seq_len, num_rows, batch_size, seed)
    rows = windows(text, tokenizer, seq_len)
    if len(rows) < num_rows:
        raise ValueError(
            f"calibration: the text has {len(rows)} rows of seq_len={seq_len}, fewer than num_rows={num_rows}: "
            "lower num_rows or seq_len, or give more text"
        )
    return [Batch(ids, ids) for ids in rows[_chosen(len(rows), num_rows, seed)].split(batch_size)]


def _sentence_batches(
    text: Texts, tokenizer: Any, seq_len: int, num_rows: int, batch_size: int, seed: int | None
) -> list[Batch]:
    sentences = read_sentences(text)
    if len(sentences) < num_rows:
        raise ValueError(
            f"calibration: the text has {len(sentences)} different sentences, fewer than num_rows={num_rows}: lower "
            "num_rows, or give more text"
        )
    chosen = [sentences[i] for i in _chosen(len(sentences), num_rows, seed).tolist()]
    encoded = tokenizer(chosen, truncation=True, max_length=seq_len).input_ids
    batches = []
    for start in range(0, num_rows, batch_size):
        ids, mask = padded(encoded[start : start + batch_size], tokenizer.pad_token_id or 0)
        batches.append(Batch(ids, ids, attention_mask=mask))
    return batches


def _chosen(available: int, num_rows: int, seed: int | None) -> torch.Tensor:
    """Row numbers: evenly over what there is, or drawn."""
    if seed is None:
        return torch.arange(num_rows) * available // num_rows
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_rows]


def text_digest(batches: Iterable[Batch]) -> str:
    """sha256 over the token ids."""
    digest = sha256()
    for batch in batches:
        digest.update(batch.input_ids.cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Calibration:
    """The calibration text of a recipe, and what is done with it. Building one reads nothing.

    Args:
        text: what to calibrate on; never what is evaluated on.
        seq_len, num_rows, batch_size, seed: see `calibration_batches`.
        max_tokens: sampled inputs a layer, chosen evenly over the text.
        ranges: of static activations: "minmax" covers all that was sampled, "mse" clips where that loses less.
        keep: a folder for statistics of full-precision inputs (AWQ's), which later runs over the same model and text
            read there, whatever their plan; None: none are kept. What quantized blocks give (GPTQ) never is.
    """

    text: str | TextSource | list[str | TextSource]
    seq_len: int = 512
    num_rows: int = 32
    batch_size: int = 4
    seed: int | None = None
    max_tokens: int = 4096
    ranges: RangeMethod = "minmax"
    keep: str | None = None

    def batches(self, tokenizer: Any) -> list[Batch]:
        """The rows as micro-batches; errors as `calibration_batches`."""
        return calibration_batches(
            self.text,
            tokenizer,
            seq_len=self.seq_len,
            num_rows=self.num_rows,
            batch_size=self.batch_size,
            seed=self.seed,
        )
