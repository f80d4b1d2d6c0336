"""Every preset on SmolLM2-135M without training: perplexity and KL to the teacher, RTN and the searches of LLM-FP4.

    python tests/benchmarks/format_table.py MODEL.gguf DATA_DIR OUT_DIR WINDOWS [NAME ...]

WINDOWS is how many of each text are evaluated (0: all). NAME is a preset or one of the rows of FPQ below; default: all.
Rows append to OUT_DIR/formats.jsonl; presets that do not fit the model's widths are printed with the reason. Activation
ranges are calibrated on training rows of C4.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.initializers import FPQ, RTN
from kdqat.models import FrozenTeacher, ModelSource, SplitModel, Teacher
from kdqat.quant import Fixed, default_activation_quantizer
from kdqat.spec import PRESETS, LayerScheme, QuantSpec
from kdqat.student import prepare_student
from kdqat.types import Batch, Outputs
from tests.benchmarks.smollm2_sweep import calibration, evaluators


class Remembering(Teacher):
    """A teacher that computes each batch once for all presets: its hidden states are kept."""

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


STATIC_INT4 = LayerScheme(weight=QuantSpec(format="int4"), activation=QuantSpec(format="int4", granularity="tensor"))
FPQ_ROWS: dict[str, tuple[Any, Any]] = {
    "int4-minmax": (STATIC_INT4, RTN()),
    "fp4-minmax": ("FP4_W4A4", RTN()),
    "fp4-search": ("FP4_W4A4", FPQ()),
    "fp4-search-bias": ("FP4_W4A4", FPQ(search="bias")),
    "fp4-pre-shift-minmax": ("FP4_W4A4_PRE_SHIFT", RTN()),
    "fp4-pre-shift": ("FP4_W4A4_PRE_SHIFT", FPQ()),
    "fp4-pre-shift-bias": ("FP4_W4A4_PRE_SHIFT", FPQ(search="bias")),
    "fp4-pre-shift-checked": ("FP4_W4A4_PRE_SHIFT", FPQ(mode="range_checked")),
    "fp4-w4a8-minmax": ("FP4_W4A8", RTN()),
    "fp4-w4a8-search": ("FP4_W4A8", FPQ()),
    "fp8-w8a8-minmax": ("FP8_W8A8", RTN()),
    "fp8-w8a8-search": ("FP8_W8A8", FPQ()),
    "fp4-w4a16-search": ("FP4_E2M1", FPQ()),
}


def main(gguf: str, data_dir: str, out_dir: str, num_windows: str, *names: str) -> None:
    folder, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ModelSource(gguf)
    original, tokenizer = SplitModel(source.load_model()), source.load_tokenizer()
    judge = Remembering(FrozenTeacher(dtype="float32"))
    judge.prepare(source, original, tokenizer, pristine=True)
    judges = evaluators(folder)
    for evaluator in judges:
        evaluator.limit = int(num_windows) or None
    original.to(device)
    for name in names or (*FPQ_ROWS, *PRESETS):
        scheme, initializer = FPQ_ROWS.get(name, (name, RTN()))
        started = time.monotonic()
        try:
            student = prepare_student(
                source,
                Uniform(scheme),
                Fixed,
                initializer,
                activation_quantizer=default_activation_quantizer,
                calibration=calibration(folder),
                split=copy.deepcopy(original),
                tokenizer=tokenizer,
            )
        except ValueError as error:
            print(f"{name:24s} does not fit: {error}", flush=True)
            continue
        prepared = time.monotonic() - started
        numbers = api.evaluate(student, judges, judge, device=device)
        bits = student.summary()["average_bits"]
        chosen = sorted({s.weight.format for s in student.plan.values() if s.weight})
        row = {"name": name, "bits": bits, "formats": chosen, "prepare_s": prepared, "numbers": numbers}
        with (out / "formats.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = "  ".join(f"{k} ppl {v['perplexity']:.2f} KL {v['kl_mean']:.3f}" for k, v in numbers.items())
        print(
            f"{name:24s} {bits:6.3f} bits  {text}  {prepared:.0f} + {time.monotonic() - started - prepared:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
