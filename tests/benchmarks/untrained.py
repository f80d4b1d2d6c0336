"""What the tables of students without training share: one model, prepared in many ways, judged by one teacher."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.initializers import Initializer
from kdqat.models import FrozenTeacher, ModelSource, SplitModel, Teacher
from kdqat.quant import Fixed
from kdqat.student import Student, prepare_student
from kdqat.types import Batch, Outputs
from tests.benchmarks.smollm2_sweep import calibration, evaluators


class Remembering(Teacher):
    """A teacher that computes each batch once for all students: its hidden states are kept."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.teacher, self.hidden = teacher, {}

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.prepare(*args, **kwargs)

    def place(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.place(*args, **kwargs)

    def release(self) -> None:
        self.teacher.release()

    def use_eager_attention(self) -> None:
        self.teacher.use_eager_attention()

    def outputs(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Outputs:
        key = batch.input_ids.cpu().numpy().tobytes()
        if key not in self.hidden:
            self.hidden[key] = self.teacher.outputs(batch, wants)
        return self.hidden[key]


class Untrained:
    """The model of a table, on a GPU if there is one, with the texts of the sweep.

    Args:
        windows: of each text that are evaluated; 0: all.
    """

    def __init__(self, path: str, data_dir: str, *, windows: int = 0, seq_len: int = 1024) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.source = ModelSource(path)
        self.original, self.tokenizer = SplitModel(self.source.load_model()), self.source.load_tokenizer()
        self.judge = Remembering(FrozenTeacher(dtype="float32"))
        self.judge.prepare(self.source, self.original, self.tokenizer, pristine=True)
        self.original.to(self.device)
        self.judges = evaluators(Path(data_dir))
        for evaluator in self.judges:
            evaluator.limit, evaluator.seq_len = windows or None, seq_len
        self.calibration: Calibration = calibration(Path(data_dir))

    def prepare(self, scheme: Any, initializer: Initializer) -> tuple[Student, float]:
        """A copy of the model under `scheme`, and the seconds that it took.

        Raises:
            ValueError: if the scheme does not fit the model.
        """
        started = time.monotonic()
        split = copy.deepcopy(self.original)
        student = prepare_student(
            self.source, Uniform(scheme), Fixed, initializer,
            calibration=self.calibration, split=split, tokenizer=self.tokenizer,
        )  # fmt: skip
        return student, time.monotonic() - started

    def evaluate(self, student: Student) -> dict[str, Any]:
        """Its numbers by text."""
        return api.evaluate(student, self.judges, self.judge, device=self.device)


def append(row: dict[str, Any], file: Path) -> None:
    """Add a line to a table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
