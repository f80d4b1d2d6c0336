"""How far a student without training is from its source: the error of its last hidden states on calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.calibrate import Calibration
from kdqat.models import SplitModel
from kdqat.quant import full_precision
from kdqat.student import Student


@torch.no_grad()
def hidden_states(split: SplitModel, student: Student, text: Calibration) -> Tensor:
    split.eval()
    return torch.cat([split(batch).hidden for batch in text.batches(student.tokenizer)])


def hidden_error(
    student: Student, text: Calibration, *, quantized: bool = True, original: SplitModel | None = None
) -> float:
    """Relative to the source's hidden states; with quantized=False the student computes with its latent weights.

    Args:
        original: the source; None: loaded anew.
    """
    source = hidden_states(original or SplitModel(student.source.load_model()), student, text)
    if quantized:
        own = hidden_states(student.split, student, text)
    else:
        with full_precision(student.model):
            own = hidden_states(student.split, student, text)
    return float((own - source).norm() / source.norm())
