"""Trains SmolLM2-135M under several settings in one process and prints KL and perplexity beside RTN's.

    python tests/benchmarks/smollm2_sweep.py MODEL.gguf DATA_DIR OUT_DIR SETTING [SETTING ...]

A setting is SCHEME[,key=value ...], where SCHEME is a preset or the path of a plan (.json). Keys: lr, scale_ratio,
warmup, final, beta2, clip, init, quantizer, frozen (a part of names), steps, loss, seed, zero, hidden, cosine, opt,
batch, accumulate, compile, only (one evaluation text), windows (evaluate on so many), teacher (hidden, top_k: answers
written beforehand), k, kv, deploy (activation quantization only in evaluation), freeze (roles, as o+v), precision
(bf16-mixed), granularity (of the weights, instead of the scheme's), data (how many of the training texts, C4 first).
Rows append to OUT_DIR/sweep.jsonl; settings that it has already are passed over.
Static activation ranges and FPQ are calibrated on the first training text.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdqat import api
from kdqat.allocate import BitAllocator, FromFile, Uniform
from kdqat.calibrate import Calibration
from kdqat.callbacks import Freeze
from kdqat.data import PackedText, TextSource
from kdqat.evaluators import TeacherAgreement
from kdqat.initializers import FPQ, RTN, MSEGrid
from kdqat.losses import CAKLD, CrossEntropy, ForwardKL, GeneralizedJSD, HiddenStates, ReverseKL, WeightedSum
from kdqat.models import CachedTeacher, FrozenTeacher, ModelSource, SplitModel, Teacher
from kdqat.quant import LSQ, Fixed, MinMax
from kdqat.quant.quantizers.seq import SEQ
from kdqat.spec import preset
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


def calibration(folder: Path) -> Calibration:
    """Rows of the training text."""
    return Calibration(texts(folder)[0], seq_len=512, num_rows=32, max_tokens=2048)


def evaluators(folder: Path) -> list[TeacherAgreement]:
    """In-domain-like and out-of-domain text, in windows of 1024; of C4 the rows that nobody trains on."""
    common: dict[str, Any] = {"seq_len": 1024, "batch_size": 8}
    c4 = TextSource(path=str(folder / "c4_en_sample_300.jsonl"), rows="240:300")
    return [
        TeacherAgreement(c4, label="c4", **common),
        TeacherAgreement(str(folder / "wikitext2_raw_test.txt"), label="wikitext2", protocol="wikitext2", **common),
        TeacherAgreement(str(folder / "ptb_test.txt"), label="ptb", protocol="ptb", **common),
    ]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (torch.optim.Muon, update RMS matched to AdamW) for block weights, AdamW for everything else."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.base = lr
        blocks = [p for g in groups if g["name"] == "weights" for p in g["params"] if p.shape[0] < 10_000]
        chosen = {id(p) for p in blocks}
        scales = [p for g in groups if g["name"] == "scales" for p in g["params"]]
        rest = [p for g in groups if g["name"] != "scales" for p in g["params"] if id(p) not in chosen]
        self.parts = [torch.optim.Muon(blocks, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        self.parts += [torch.optim.AdamW(p, lr=r * lr, weight_decay=0.0) for p, r in ((rest, 1.0), (scales, 0.1))]
        self.rates = [r * lr for r in (1.0, 1.0, 0.1)]

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        share = self.param_groups[0]["lr"] / self.base
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
        return loss


def main(gguf: str, data_dir: str, out_dir: str, *settings: str) -> None:
    folder, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ModelSource(gguf)
    original, tokenizer = SplitModel(source.load_model()), source.load_tokenizer()
    judge = FrozenTeacher(dtype="float32")
    judge.prepare(source, original, tokenizer, pristine=True)
    measured_rtn: dict[str, Any] = {}
    torch._dynamo.config.recompile_limit = 256  # settings share the blocks' code; beyond the limit they would be eager
    rows = out / "sweep.jsonl"
    done = {json.loads(line)["setting"] for line in rows.read_text().splitlines()} if rows.exists() else set()
    for setting in settings:
        if setting in done:
            continue
        try:
            row = train_one(setting, source, original, tokenizer, judge, folder, measured_rtn, device)
        except Exception:  # the other settings have their time on the device too
            print(f"{setting} failed\n{traceback.format_exc()[-1500:]}", flush=True)
            continue
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)


def train_one(
    setting: str,
    source: ModelSource,
    original: SplitModel,
    tokenizer: Any,
    judge: FrozenTeacher,
    folder: Path,
    measured_rtn: dict[str, Any],
    device: str,
) -> dict[str, Any]:
    """Prepare, measure RTN, train and measure one setting; the row for the table."""
    scheme, *pairs = setting.split(",")
    args = dict(pair.split("=") for pair in pairs)
    torch.manual_seed(int(args.get("seed", 0)))
    asym = "ASYM" in scheme
    quantizer: Any = {
        "lsq": partial(LSQ, learn_zero_point=asym and args.get("zero", "0") == "1"),
        "minmax": MinMax,
        "fixed": Fixed,
        "seq": SEQ,
    }[args.get("quantizer", "lsq")]
    initializer = {"mse": MSEGrid, "rtn": RTN, "fpq": FPQ}[args.get("init", "mse")]()
    deploy: Any = ("activation",) if args.get("deploy") == "1" else ()
    allocator: BitAllocator
    if scheme.endswith(".json"):
        allocator = FromFile(scheme)
    else:
        what: Any = preset(scheme)
        if "granularity" in args:
            what = replace(what, weight=replace(what.weight, granularity=args["granularity"]))
        allocator = Uniform(what, kv_cache=args.get("kv"), deploy_only=deploy)
    split = copy.deepcopy(original).to(device)  # searches are the GPU's work
    student = prepare_student(
        source, allocator, quantizer, initializer, calibration=calibration(folder), split=split, tokenizer=tokenizer
    )
    judges = [e for e in evaluators(folder) if args.get("only", e.label) == e.label]
    for evaluator in judges:
        evaluator.limit = int(args["windows"]) if "windows" in args else None
    base = ",".join([scheme, args.get("granularity", ""), "fpq" if args.get("init") == "fpq" else ""])
    if base not in measured_rtn:
        with as_rtn(student) as rtn:
            measured_rtn[base] = api.evaluate(rtn, judges, judge, device=device)
    for name, parameter in split.named_parameters():
        parameter.requires_grad_("frozen" not in args or args["frozen"] not in name)
    loss: Any = LOSSES[args.get("loss", "kl")]()
    if "hidden" in args:
        loss = WeightedSum([loss, HiddenStates("mse")], [1.0, float(args["hidden"])])
    if "cosine" in args:
        loss = WeightedSum([loss, HiddenStates("cosine")], [1.0, float(args["cosine"])])
    steps = int(args.get("steps", 300))
    data = PackedText(
        texts(folder)[: int(args["data"]) if "data" in args else None],
        seq_len=1024,
        batch_size=int(args.get("batch", 16)),
        shuffle_seed=int(args.get("seed", 0)),
    )
    api.bind_data(data, student)
    teacher: Teacher = FrozenTeacher(dtype="bfloat16", compile=args.get("compile", "0") == "1")
    filling = 0.0
    if "teacher" in args:  # hidden, or top_k with k
        teacher = CachedTeacher(FrozenTeacher(), kind=args["teacher"], k=int(args.get("k", 64)))  # type: ignore[arg-type]
        started = time.monotonic()
        api.cache(source, teacher, data, device=device)
        filling = time.monotonic() - started
    teacher.prepare(source, original, tokenizer, pristine=True)
    module = KDQATModule.from_student(
        student,
        plan=allocator,
        quantizer=quantizer,
        loss=loss,
        optimizer=optimizer_of(args, fused=device == "cuda"),
        scheduler=partial(
            WarmupCosine, warmup_steps=int(args.get("warmup", 20)), final_ratio=float(args.get("final", 0.0))
        ),
        teacher=teacher,
        scale_lr_ratio=float(args.get("scale_ratio", 0.1)),
        parallel=Parallel(compile_blocks=args.get("compile", "0") == "1"),
    )
    trainer_args = {
        "max_steps": steps,
        "accelerator": "auto",
        "devices": 1,
        "precision": args.get("precision", "bf16-mixed"),
        "gradient_clip_val": float(args.get("clip", 1.0)),
        "accumulate_grad_batches": int(args.get("accumulate", 1)),
        "enable_progress_bar": False,
        "limit_val_batches": 0,
    }
    edits = [Freeze(roles=args["freeze"].split("+"))] if "freeze" in args else []
    trainer = api.make_trainer(trainer_args, None, edits)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    trainer.fit(module, datamodule=data, weights_only=True)
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    numbers = api.evaluate(student, judges, judge, device=device)
    tokens = steps * int(args.get("batch", 16)) * int(args.get("accumulate", 1)) * 1024
    return {"setting": setting, "rtn": measured_rtn[base], "student": numbers, "seconds": seconds,
           "tokens_per_s": tokens / seconds, "peak_gib": peak, "filling_s": filling}  # fmt: skip


def optimizer_of(args: dict[str, str], fused: bool) -> Any:
    """What `opt`, `lr` and `beta2` of a setting name."""
    lr = float(args.get("lr", 3e-4))
    if args.get("opt") == "muon":
        return partial(MuonAdamW, lr=lr)
    betas = (0.9, float(args.get("beta2", 0.999)))
    fused = fused and not args.get("precision", "").startswith("16")  # clipping needs the loss scale taken out before
    return partial(torch.optim.AdamW, lr=lr, betas=betas, weight_decay=0.0, fused=fused)


def describe(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    parts = [f"{row['setting']:70s}"]
    for label in row["student"]:
        rtn, student = row["rtn"][label], row["student"][label]
        parts.append(
            f"{label}: ppl {rtn['perplexity']:.2f} -> {student['perplexity']:.2f} "
            f"({student['teacher_perplexity']:.2f}) KL {rtn['kl_mean']:.4f} -> {student['kl_mean']:.4f} "
            f"top1 {100 * student['top1']:.1f}"
        )
    return "  ".join(parts) + f"  {row['tokens_per_s']:,.0f} tok/s {row['peak_gib']:.1f} GiB"


if __name__ == "__main__":
    main(*sys.argv[1:])
