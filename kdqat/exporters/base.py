"""What an exporter is: it writes the codes and scales a student trained with, and never recomputes them.

What it wrote is read back by somebody else (`reader`): a script that has never heard of kdqat, run in a process of its
own. The parity gate (`parity.py`) compares what it read with what the student computes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdqat.spec import LayerScheme, QuantPlan
from kdqat.student import Student

log = logging.getLogger(__name__)


class Exporter(ABC):
    """One serving format.

    Class attributes, or properties where they depend on the constructor's arguments:
        name: its folder under export/.
        words: what the command line calls it -> the constructor's arguments for that, e.g.
            {"gguf:q4_0": {"type": "q4_0"}}; empty: its `name`.
        reader: file in `kdqat/exporters/readers/`, or the path of a script elsewhere; None: nothing independent can
            read this format, and its exports say so.
        engine: likewise a script that runs the serving engine itself and answers with `nll`, for the gate to ask
            besides, where it is installed (`parity_engine.py`); None: there is none.
        compute_dtype: in which the reader holds dequantized weights: "float32", "bfloat16" or "float16".
        applies_activations: whether the reader quantizes activations as the plan says; else its logits are compared
            with those of the student's quantized weights alone.
        holds_kv_cache: whether the format holds scales of a KV cache; the reader then answers with these, and where
            it computes in float32, its model quantizes the cache.
        holds_inputs: whether the format says how inputs of layers are quantized; the reader then answers with bits and
            static ranges (`parity_inputs.py`).
        library_name: of the model card, as the Hugging Face hub knows it.
    """

    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    reader: ClassVar[str | None]
    engine: ClassVar[str | None] = None
    applies_activations: ClassVar[bool] = False
    holds_kv_cache: ClassVar[bool] = False
    holds_inputs: ClassVar[bool] = False
    library_name: ClassVar[str] = "transformers"

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def compute_dtype(self) -> str:
        return "float32"

    @property
    def plain_dtype(self) -> str:
        """In which the format holds what the plan leaves alone, at the worst; its logits are judged by that, too."""
        return "float32"

    def stored(self, key: str, value: Tensor) -> Tensor:
        """What a reader of the format finds of the tensor `key` that the plan leaves alone: `value` rounded to
        `compute_dtype`, if it is no integer. The gate compares it exactly."""
        return value.to(getattr(torch, self.compute_dtype)) if value.is_floating_point() else value

    @abstractmethod
    def refuses(self, student: Student) -> str | None:
        """Why this format cannot hold the student's plan losslessly: layer, reason, nearest format that fits; None if
        it can. It is asked before training as well, so it looks at plan and shapes and not at weights."""

    @abstractmethod
    def export(self, student: Student, out_dir: Path) -> None:
        """Write codes and scales as stored into the empty folder `out_dir`, with config, tokenizer and plan."""

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        """Engine -> the command (or the lines of Python) that runs the export `folder` in it, for the model card."""
        return {}

    def leaves(self, plan: QuantPlan) -> str:
        """What `plan` quantizes besides weights and the engine computes otherwise than in training (in full precision,
        or by a rule of its own), in words; "" if nothing."""
        return besides_weights(plan.values(), plan.kv_cache is not None)

    def say_what_is_left(self, plan: QuantPlan) -> None:
        """Log it."""
        if left := self.leaves(plan):
            log.warning("export %s holds weights only: %s of the plan are for the engine to apply", self.name, left)

    def require_writer(self) -> None:
        """
        Raises:
            ValueError: if the package that `export` needs is missing.
        """
        if missing := self.writer_missing():
            raise ValueError(f"export {self.name} writes with {missing}")

    def engine_missing(self) -> str | None:
        """The package that its engine is in and how to install it; None if it is there."""
        return None

    def writer_missing(self) -> str | None:
        """The package that `export` needs and how to install it; None if it is there. Asked before training, too."""
        return None

    def reader_missing(self) -> str | None:
        """The package its reader needs and how to install it; None if it is there."""
        return None


def besides_weights(schemes: Iterable[LayerScheme], kv_cache: bool) -> str:
    """What `schemes` quantize besides weights, in words."""
    schemes = list(schemes)
    kinds = {
        "activations": any(scheme.activation is not None for scheme in schemes),
        "outputs": any(scheme.output is not None for scheme in schemes),
        "the KV cache": kv_cache,
    }
    return ", ".join(kind for kind, there in kinds.items() if there)


def refuses_besides_weights(plan: QuantPlan, what: str) -> str | None:
    """Why the format `what`, which holds weights alone, refuses `plan`, naming the first layer; None if it need not."""
    lost = besides_weights(plan.values(), plan.kv_cache is not None)
    if not lost:
        return None
    quantized = (name for name, s in plan.items() if s.activation is not None or s.output is not None)
    first = next(quantized, "kv_cache")
    return f"{first}: {what} has no place for {lost} that are quantized; plan weights only, or use CompressedTensors"
