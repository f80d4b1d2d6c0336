"""What a recipe's trainer section says about devices and precision, read without building a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from kdqat.data import TextData
from kdqat.training.planner.trace import Rows

_AUTOCAST: dict[str, torch.dtype | None] = {
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "32-true": None,
    "32": None,
    "bf16": torch.bfloat16,
    "16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The trainer's part of a plan."""

    device: str  # "cuda" or "cpu"
    world_size: int
    on_machine: int  # processes that share this machine
    autocast: torch.dtype | None
    accumulate: int
    steps: int | None
    callbacks: tuple[L.Callback, ...]


def read_setup(args: Mapping[str, Any]) -> Setup:
    """
    Raises:
        ValueError: for a precision or an accelerator that is not planned for.
    """
    precision = str(args.get("precision") or "32-true")
    if precision not in _AUTOCAST:
        raise ValueError(f"trainer.precision {precision}: memory is planned for bf16-mixed, 16-mixed and 32-true only")
    accelerator = args.get("accelerator") or "auto"
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"trainer.accelerator {accelerator}: memory is planned for cpu and gpu (CUDA) only")
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    devices = _devices(args.get("devices"), torch.cuda.device_count() if cuda else 1)
    steps = args.get("max_steps")
    return Setup(
        device="cuda" if cuda else "cpu",
        world_size=devices * int(args.get("num_nodes") or 1),
        on_machine=devices,
        autocast=_AUTOCAST[precision],
        accumulate=int(args.get("accumulate_grad_batches") or 1),
        steps=int(steps) if steps is not None and int(steps) > 0 else None,
        callbacks=tuple(_listed(args.get("callbacks"))),
    )


def rows_of(data: TextData) -> Rows:
    """The micro-batches that a data module makes: packed documents apart, or padded conversations."""
    segments = bool(getattr(data, "document_mask", False) or getattr(data, "packing", False))
    padding = hasattr(data, "packing") and not segments
    return Rows(batch_size=data.batch_size, seq_len=data.seq_len, segments=segments, padding=padding)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _devices(given: Any, there: int) -> int:
    if given in (None, "auto", -1, "-1"):
        return max(there, 1)
    if isinstance(given, (list, tuple)):
        return len(given)
    text = str(given)
    return len([part for part in text.split(",") if part]) if "," in text else int(text)
