"""The parity gate: what an independent reader makes of an export is what the student computed.

The exported folder is read back in a process that has no part of kdqat in it (`parity_reader.py`). Codes, scales and
zero points must be the student's bit for bit, weights scale * (code - zero point) rounded once to the reader's dtype,
every other tensor as the format holds it, none too few and none too many (`parity_layers.py`); logits on real text
within the tolerance of that dtype (`parity_logits.py`). The numbers go into `parity.json` beside the weights, whatever
they are.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kdqat.data import windows
from kdqat.exporters.base import Exporter
from kdqat.exporters.parity_engine import ask_engine
from kdqat.exporters.parity_inputs import compare_inputs
from kdqat.exporters.parity_layers import compare_layers
from kdqat.exporters.parity_logits import answers_of, compare_answers, fault_of, tolerance_for
from kdqat.exporters.parity_reader import CannotRead, ReaderFailed, ask_reader
from kdqat.files import write_json_as
from kdqat.student import Student

PARITY_FILE = "parity.json"
TEXT, NUM_WINDOWS, SEQ_LEN = "kdqat:prose", 4, 128


class ParityError(ValueError):
    """An export that is not what the student computes."""


@dataclass
class Parity:
    """What the gate found.

    Attributes:
        verified: a reader read the folder and nothing differed.
        why: if not verified: the first fault, or why nothing could be compared.
        rejected: not verified because something differed.
        numbers: the content of parity.json besides.
    """

    verified: bool = False
    why: str | None = None
    rejected: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `folder`/parity.json."""
        head = {"verified": self.verified, "rejected": self.rejected, "why": self.why}
        write_json_as(folder, PARITY_FILE, head | self.numbers)


def verify_export(student: Student, exporter: Exporter, folder: Path, *, text: str = TEXT) -> Parity:
    """Let the exporter's reader read `folder`, compare, and write parity.json into it.

    Args:
        student: what was exported; it is left as it was.
        text: what both read, any text source (docs/data.md).

    Returns:
        The findings; whoever asked decides what becomes of a rejected folder.
    """
    parity = Parity(numbers={"format": exporter.name, "reader": exporter.reader})
    missing = exporter.reader_missing()
    if exporter.reader is None:
        parity.why = "no independent reader of this format is known"
    elif missing:
        parity.why = f"its reader is not installed: {missing}"
    else:
        _compare(parity, student, exporter, folder, text)
    parity.save(folder)
    return parity


def _compare(parity: Parity, student: Student, exporter: Exporter, folder: Path, text: str) -> None:
    assert exporter.reader is not None
    ids = text_of(student, text)
    where = next(student.model.parameters()).device
    student.split.to("cpu")  # where the reader computes
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".parity-") as scratch:
            answer = ask_reader(exporter.reader, folder, ids, Path(scratch))
            latent = str(next(student.model.parameters()).dtype).removeprefix("torch.")
            judged_as, tolerance = tolerance_for(exporter.compute_dtype, exporter.plain_dtype, latent)
            # an FP8 cache in a model of 16 bits: what lies on the edge of two codes falls to either side
            cache = (
                exporter.holds_kv_cache and exporter.compute_dtype == "float32" and student.plan.kv_cache is not None
            )
            applied = {"activations": exporter.applies_activations, "kv_cache": cache}
            layers = compare_layers(
                student,
                answer.path,
                exporter.compute_dtype,
                stored=exporter.stored,
                kv_cache=exporter.holds_kv_cache,
            )
            if exporter.holds_inputs:
                compare_inputs(student, answer.path, layers)
            kind, ours = answers_of(student, ids, **applied)
            numbers, engine, fault = None, None, None
            if exporter.engine is not None and kind == "logits":
                engine, fault = ask_engine(exporter, folder, ids, ours, Path(scratch) / "engine")
            with safe_open(answer.path, framework="pt") as tensors:
                if kind in tensors.keys() and not (cache and latent != "float32"):  # noqa: SIM118 - no mapping
                    numbers = compare_answers(kind, ours, tensors.get_tensor(kind))
    except CannotRead as error:
        parity.why = f"its reader cannot read this model: {error}"
        return
    except ReaderFailed as error:
        parity.why, parity.rejected = str(error), True
        return
    finally:
        student.split.to(where)
    of_logits = None if numbers is None else fault_of(kind, numbers, tolerance)
    faults = [*layers.faults, *(said for said in (of_logits, fault) if said)]
    parity.numbers |= {
        "versions": answer.versions,
        "compute_dtype": exporter.compute_dtype,
        "student_dtype": latent,
        "tolerance": {"of": judged_as, **asdict(tolerance)},
        "text": {"source": text, "shape": list(ids.shape), "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()},
        **{key: "as planned" if on else "in full precision, on both sides" for key, on in applied.items()},
        "layers": len(student.layers),
        **layers.counts,
        kind: numbers,  # null: not compared, the reader reads weights only
        **({"engine": engine} if engine is not None else {}),
        "faults": faults,
    }
    parity.verified, parity.rejected = not faults, bool(faults)
    parity.why = faults[0] if faults else None


def text_of(student: Student, text: str) -> Tensor:
    """A few windows [B, T] int64 of `text`, no longer than the model's positions."""
    positions = getattr(student.model.config, "max_position_embeddings", None)
    seq_len = min(SEQ_LEN, positions) if positions else SEQ_LEN
    tokenizer = student.tokenizer
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:  # an encoder's end of a text
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = tokenizer.sep_token
    return windows(text, tokenizer, seq_len, limit=NUM_WINDOWS).to(torch.int64)
