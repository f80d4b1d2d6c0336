"""Trains SmolLM2-135M under several settings in one process and prints KL and perplexity beside RTN's.

    python tests/benchmarks/smollm2_sweep.py MODEL.gguf DATA_DIR OUT_DIR SETTING [SETTING ...]

A setting is SCHEME[,key=value ...]: lr, scale_ratio, warmup, final, beta2, clip, init, quantizer, frozen (a part of
names), steps, loss, seed, zero, hidden, batch, accumulate, compile. Rows append to OUT_DIR/sweep.jsonl.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.data import PackedText, TextSource
from kdqat.evaluate import TeacherAgreement
from kdqat.initializers import RTN, MSEGrid
from kdqat.losses import CAKLD, CrossEntropy, ForwardKL, GeneralizedJSD, HiddenStates, ReverseKL, WeightedSum
from kdqat.models import FrozenTeacher, ModelSource, SplitModel
from kdqat.quant import LSQ, Fixed, MinMax
from kdqat.student import as_rtn, prepare_student
from kdqat.training import KDQATModule, Parallel, WarmupCosine

LOSSES = {
    "kl": ForwardKL,
    "rkl": ReverseKL,
    "jsd": GeneralizedJSD,
    "cakld": partial(CAKLD, None),
    "ce": CrossEntropy,
    "kl_t2": partial(ForwardKL, 2.0),
}


def texts(folder: Path) -> list[str | TextSource]:
    """The training text of docs/results: no evaluation row in it."""
    return [
        TextSource(path=str(folder / "c4_en_sample_300.jsonl"), rows="0:240"),
        TextSource(path=str(folder / "alpaca_9k_random.jsonl.gz"), keys=("instruction", "input", "output")),
        TextSource(path=str(folder / "wikipedia_en_sample_30.txt"), split_lines=True),
        str(folder / "wikitext2_tokens_valid.txt"),
        str(folder / "tinyshakespeare.txt"),
    ]


def evaluators(folder: Path) -> list[TeacherAgreement]:
    """In-domain-like and out-of-domain text, in windows of 1024."""
    common: dict[str, Any] = {"seq_len": 1024, "batch_size": 8}
    return [
        TeacherAgreement(str(folder / "wikitext2_raw_test.txt"), label="wikitext2", protocol="wikitext2", **common),
        TeacherAgreement(str(folder / "ptb_test.txt"), label="ptb", protocol="ptb", **common),
    ]


def main(gguf: str, data_dir: str, out_dir: str, *settings: str) -> None:
    folder, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ModelSource(gguf)
    original, tokenizer = SplitModel(source.load_model()), source.load_tokenizer()
    judge = FrozenTeacher(dtype="float32")
    judge.prepare(source, original, tokenizer, pristine=True)
    measured_rtn: dict[str, Any] = {}
    for setting in settings:
        scheme, *pairs = setting.split(",")
        args = dict(pair.split("=") for pair in pairs)
        torch.manual_seed(int(args.get("seed", 0)))
        asym = "ASYM" in scheme
        quantizer: Any = {
            "lsq": partial(LSQ, learn_zero_point=asym and args.get("zero", "0") == "1"),
            "minmax": MinMax,
            "fixed": Fixed,
        }[args.get("quantizer", "lsq")]
        initializer = {"mse": MSEGrid, "rtn": RTN}[args.get("init", "mse")]()
        allocator, split = Uniform(scheme), copy.deepcopy(original)
        student = prepare_student(source, allocator, quantizer, initializer, split=split, tokenizer=tokenizer)
        if scheme not in measured_rtn:
            with as_rtn(student) as rtn:
                measured_rtn[scheme] = api.evaluate(rtn, evaluators(folder), judge, device=device)
        for name, parameter in split.named_parameters():
            parameter.requires_grad_("frozen" not in args or args["frozen"] not in name)
        loss: Any = LOSSES[args.get("loss", "kl")]()
        if "hidden" in args:
            loss = WeightedSum([loss, HiddenStates("mse")], [1.0, float(args["hidden"])])
        steps = int(args.get("steps", 300))
        teacher = FrozenTeacher(dtype="bfloat16")
        teacher.prepare(source, original, tokenizer, pristine=True)
        module = KDQATModule.from_student(
            student,
            plan=allocator,
            quantizer=quantizer,
            loss=loss,
            optimizer=partial(
                torch.optim.AdamW,
                lr=float(args.get("lr", 3e-4)),
                betas=(0.9, float(args.get("beta2", 0.999))),
                weight_decay=0.0,
                fused=device == "cuda",
            ),
            scheduler=partial(
                WarmupCosine, warmup_steps=int(args.get("warmup", 20)), final_ratio=float(args.get("final", 0.0))
            ),
            teacher=teacher,
            scale_lr_ratio=float(args.get("scale_ratio", 0.1)),
            parallel=Parallel(compile_blocks=args.get("compile", "0") == "1"),
        )
        data = PackedText(
            texts(folder), seq_len=1024, batch_size=int(args.get("batch", 16)), shuffle_seed=int(args.get("seed", 0))
        )
        api.bind_data(data, student)
        trainer_args = {
            "max_steps": steps,
            "accelerator": "auto",
            "devices": 1,
            "precision": "bf16-mixed",
            "gradient_clip_val": float(args.get("clip", 1.0)),
            "accumulate_grad_batches": int(args.get("accumulate", 1)),
            "enable_progress_bar": False,
            "limit_val_batches": 0,
        }
        trainer = api.make_trainer(trainer_args, None)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        trainer.fit(module, datamodule=data, weights_only=True)
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        numbers = api.evaluate(student, evaluators(folder), judge, device=device)
        tokens = steps * int(args.get("batch", 16)) * int(args.get("accumulate", 1)) * 1024
        row = {"setting": setting, "rtn": measured_rtn[scheme], "student": numbers, "seconds": seconds,
               "tokens_per_s": tokens / seconds, "peak_gib": peak}  # fmt: skip
        with (out / "sweep.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    parts = [f"{row['setting']:70s}"]
    for label in row["student"]:
        rtn, student = row["rtn"][label], row["student"][label]
        parts.append(
            f"{label}: ppl {rtn['perplexity']:.2f} -> {student['perplexity']:.2f} "
            f"({student['teacher_perplexity']:.2f}) KL {rtn['kl_mean']:.4f} -> {student['kl_mean']:.4f} top1 {100 * student['top1']:.1f}"
        )
    return "  ".join(parts) + f"  {row['tokens_per_s']:,.0f} tok/s {row['peak_gib']:.1f} GiB"


if __name__ == "__main__":
    main(*sys.argv[1:])
