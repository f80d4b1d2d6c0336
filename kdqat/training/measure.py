"""The probe's numbers of a student as it is, outside of training: what quantization broke, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from kdqat.calibrate import calibration_batches
from kdqat.data import Texts
from kdqat.models import FrozenTeacher, Teacher, layer_refs
from kdqat.student import Student
from kdqat.training.probe import live_split, require_live
from kdqat.training.probe.batch import real_positions
from kdqat.training.probe.passes import full_precision_energies, probe_pass, probed_layers
from kdqat.training.tables import places_of, signal_values
from kdqat.types import Batch, LayerRef

Row = dict[str, Any]  # step, source, metric, block, role, layer, value: as signals.parquet


def signals(
    student: Student,
    teacher: Teacher | None = None,
    text: Texts = "python_docs:heldout",
    *,
    num_rows: int = 8,
    num_tokens: int = 256,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """What quantization does to the signal of every layer and block (docs/signals.md).

    Args:
        student: trained or not; encoders too. It and the teacher are left on `device`.
        teacher: default: the student's source, frozen, in float32.
        text: what both read; for an encoder a row is a sentence of it.
        num_rows, num_tokens: of it.

    Returns:
        Rows with the columns of signals.parquet, step 0: source "signal", and of causal language models "gradient".

    Raises:
        ValueError: for a text with too few rows, or a teacher that does not fit.
    """
    teacher = teacher if teacher is not None else FrozenTeacher(dtype="float32")
    require_live(teacher, "signals")
    sizes = {"seq_len": num_tokens, "num_rows": num_rows, "batch_size": num_rows}
    (batch,) = calibration_batches(text, student.tokenizer, **sizes)
    teacher.prepare(student.source, student.split, student.tokenizer, pristine=False)
    teacher.place(torch.device(device))
    student.split.to(device)
    return measure_signals(student, teacher, move_data_to_device(batch, device))


def measure_signals(student: Student, teacher: Teacher, batch: Batch) -> list[Row]:
    """Every signal of every layer and block, teacher against student, and where there is a language-model head the
    energy of the cross-entropy's gradient at every weight (ce_weight_energy), also over that of the full-precision
    model on the same tokens (ce_weight_energy_ratio).

    Args:
        teacher: placed on the device of `batch`, like the student.

    Raises:
        ValueError: for a teacher that answers from a cache, or of another architecture.
    """
    split, planned = student.split, student.layers
    full = live_split(teacher, "signals")
    refs = probed_layers(split, layer_refs(student.model), planned)
    names = [ref.name for ref in refs]
    gradients = split.family.causal and split.has_head
    seen = probe_pass(split, batch, names, teacher=teacher, loss=None, context=nullcontext, attention=True,
                      gradients=gradients, cross_entropy=gradients)  # fmt: skip
    places = places_of(student.model, refs)
    rows: list[Row] = []
    for metric, where, values in signal_values(seen, real_positions(batch), places):
        rows += _rows("signal", metric, where, values)
    if gradients and not any(getattr(teacher, option, False) for option in ("fp8", "offload")):
        found, ours = seen.cross_entropy["weight_energy"]
        theirs = dict(zip(*full_precision_energies(full, batch, names, nullcontext)["weight_energy"], strict=True))
        where = [places[name] for name in found]
        rows += _rows("gradient", "ce_weight_energy", where, ours)
        if found:  # not in a plan of embeddings, experts or the head alone
            ratio = ours / torch.stack([theirs[name] for name in found]).to(ours)
            rows += _rows("gradient", "ce_weight_energy_ratio", where, ratio)
    return rows


def _rows(source: str, metric: str, places: Sequence[LayerRef | None], values: torch.Tensor) -> list[Row]:
    return [
        {"step": 0, "source": source, "metric": metric, "block": -1 if ref.block is None else ref.block,
         "role": ref.role, "layer": ref.name, "value": value}
        for ref, value in zip(places, values.double().tolist(), strict=True)
        if ref is not None
    ]  # fmt: skip
