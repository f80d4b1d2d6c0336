"""What a KD-QAT step costs: milliseconds, tokens a second, MFU and peak memory, beside the same step without fake
quantization and beside torchao's QAT with a plain KL, all in one process.

    python tests/benchmarks/step_time.py OUT_DIR SETTING [SETTING ...]

A setting is WHAT[,key=value ...]. WHAT: lsq, minmax, seq (quantizers), none (no fake quantization), torchao.
Keys: scheme (W4A16_G128), compile, checkpoint (0, 1, selective), teacher (live, compiled, fp8, offload, shared, hidden,
topk: the last two answer from memory what a cache would read), opt (adamw, adam8), chunk, shape (1b, 7b, smollm2,
tiny), batch, seq, steps, profile, devices (FSDP2; one such setting a call: the script is started once a device, and
batch is each one's). Models have random weights; rows are random tokens. Each setting runs
KDQATModule under a Trainer, but for torchao, which has no such loop: there it is the plain one.
Rows append to OUT_DIR/step_time.jsonl.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from step_clock import Clock
from transformers import LlamaConfig, LlamaForCausalLM

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.initializers import RTN
from kdqat.losses import ForwardKL
from kdqat.models import FrozenTeacher, ModelSource, SplitModel, Teacher
from kdqat.quant import LSQ, MinMax
from kdqat.quant.quantizers.seq import SEQ
from kdqat.quant.swap import strip_fake_quant
from kdqat.student import prepare_student
from kdqat.training import KDQATModule, Parallel
from kdqat.types import Batch, Outputs

SHAPES = {  # hidden, layers, MLP width, heads, KV heads, vocabulary, tied
    "1b": (2048, 16, 8192, 32, 8, 128256, True),
    "7b": (4096, 32, 11008, 32, 32, 32000, False),
    "smollm2": (576, 30, 1536, 9, 3, 49152, True),
    "tiny": (128, 2, 256, 4, 2, 512, True),
}
PEAK = 989e12  # dense bf16 FLOP/s of an H200
QUANTIZERS: dict[str, Any] = {"lsq": LSQ, "minmax": MinMax, "seq": SEQ, "none": MinMax}


def main(out_dir: str, *settings: str) -> None:
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for setting in settings:
        what, *pairs = setting.split(",")
        args = dict(pair.split("=") for pair in pairs)
        try:
            row = {"setting": setting, **(measure_torchao(args) if what == "torchao" else measure(what, args, out))}
        except Exception:  # the other settings have their time on the device too
            print(f"{setting} failed\n{traceback.format_exc()[-3000:]}", flush=True)
            row = None
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if row is None or os.environ.get("LOCAL_RANK", "0") != "0":
            continue
        rows[setting] = row
        with (out / "step_time.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)


def llama(shape: str) -> LlamaForCausalLM:
    """A Llama of random weights, fp32, where training will be."""
    hidden, layers, mlp, heads, kv_heads, vocab, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=4096,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with own_device():
        return LlamaForCausalLM(config)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device() -> torch.device:
    """This process's own."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device() == "cuda" else torch.device("cpu")


class Rows:
    """The same random batch again and again."""

    def __init__(self, args: dict[str, str], vocab: int) -> None:
        size = (int(args.get("batch", 8)), int(args.get("seq", 1024)))
        ids = torch.randint(0, vocab, size, generator=torch.Generator().manual_seed(0))
        self.batch, self.num = Batch(ids, ids.clone()), int(args.get("steps", 16))

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Any:
        return iter([self.batch] * self.num)


class Remembered(FrozenTeacher):
    """Answers every batch with what the live teacher said to the first: a cache whose reading costs nothing."""

    kind = "hidden"

    def outputs(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Any:
        if not hasattr(self, "_answer"):
            live = super().outputs(batch, wants)
            self._answer: Any = live
            if self.kind == "topk":
                from kdqat.types import TopKOutputs

                with torch.no_grad():
                    parts = [F.log_softmax(live.head(row).float(), -1).topk(64) for row in live.hidden]
                values, ids = (torch.stack(part) for part in zip(*parts, strict=True))
                tail = torch.log1p(-values.exp().sum(-1).clamp(max=1 - 1e-6))
                self._answer = TopKOutputs(ids.int(), values, tail, {})
        if isinstance(self._answer, Outputs):
            return Outputs(self._answer.hidden, self._answer.head, {})
        return self._answer


def make_teacher(kind: str) -> Teacher | None:
    if kind == "shared":
        from kdqat.models.shared_teacher import SharedTeacher

        return SharedTeacher()
    if kind in ("hidden", "topk"):
        teacher = Remembered()
        teacher.kind = kind
        return teacher
    options: dict[str, Any] = {"live": {}, "compiled": {"compile": True}, "fp8": {"fp8": True, "compile": True},
                               "offload": {"offload": True}}[kind]  # fmt: skip
    return FrozenTeacher(dtype="bfloat16", **options)


def sample(parameter: torch.Tensor) -> torch.Tensor:
    """About a thousand of its elements, from everywhere (rows of an embedding that no token names stay)."""
    return parameter.detach().flatten()[:: max(1, parameter.numel() // 1000 | 1)].clone().cpu()


def measure(what: str, args: dict[str, str], out: Path) -> dict[str, Any]:
    """One setting through KDQATModule and a Trainer."""
    shape, ranks = args.get("shape", "1b"), int(args.get("devices", 1))
    split, source = SplitModel(llama(shape)), ModelSource("random")
    teacher = make_teacher(args.get("teacher", "live"))
    if teacher is not None and args.get("teacher") != "shared":
        with own_device():
            teacher.prepare(source, split, None, pristine=True)
    plan = Uniform(args.get("scheme", "W4A16_G128"))
    student = prepare_student(source, plan, QUANTIZERS[what], RTN(), split=split, tokenizer=object())
    if what == "none":
        strip_fake_quant(split.model)
    if args.get("opt") == "adam8":
        from torchao.optim import AdamW8bit

        optimizer: Any = partial(AdamW8bit, lr=1e-5)
    else:
        optimizer = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
    checkpoint: Any = {"0": False, "1": True}.get(args.get("checkpoint", "0"), args.get("checkpoint"))
    loss = ForwardKL(**({"chunk_tokens": int(args["chunk"])} if "chunk" in args else {}))
    module = KDQATModule.from_student(
        student, plan=plan, quantizer=QUANTIZERS[what], loss=loss, optimizer=optimizer, teacher=teacher,
        parallel=Parallel(compile_blocks=args.get("compile") == "1", checkpoint_blocks=checkpoint, shard=ranks > 1),
        **({"trainable": "scales"} if args.get("trainable") == "scales" else {}),
    )  # fmt: skip
    clock = Clock(out / f"profile-{what}.txt" if args.get("profile") == "1" else None)
    rows = Rows(args, SHAPES[shape][5])
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1) if ranks > 1 else None
    trainer_args = {"max_steps": len(rows), "accelerator": "auto", "devices": ranks, "precision": "bf16-mixed",
                    "enable_progress_bar": False, "log_every_n_steps": 10, "strategy": strategy}  # fmt: skip
    trainer = api.make_trainer(trainer_args, None, [clock])
    watched = [] if ranks > 1 or "trainable" in args else list(split.parameters())
    before = [sample(parameter) for parameter in watched]
    reset_peak()
    trainer.fit(module, rows)
    after = [sample(parameter) for parameter in watched]
    still = sum(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    if still:  # a step that loses gradients is fast
        raise RuntimeError(f"{still} of {len(watched)} parameters did not move")
    return row_of(clock.milliseconds(), args)


def measure_torchao(args: dict[str, str]) -> dict[str, Any]:
    """torchao's QAT with its fake quantizers, a KL over all logits at once, autocast and fused AdamW."""
    import copy

    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    shape = args.get("shape", "1b")
    student = llama(shape)
    teacher = copy.deepcopy(student).to(torch.bfloat16).eval().requires_grad_(False)
    config = IntxFakeQuantizeConfig(torch.int4, group_size=128)
    quantize_(student, QATConfig(weight_config=config, step="prepare"), body_linear)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=device() == "cuda")
    rows = Rows(args, SHAPES[shape][5])
    ids = rows.batch.input_ids.to(device())
    student.train()
    reset_peak()
    clock = Clock(None)
    for _ in range(len(rows)):
        clock.on_train_batch_start(None)
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        with torch.autocast(device(), torch.bfloat16):
            logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        q, p = F.log_softmax(logits.float().flatten(0, 1), -1), F.log_softmax(target.float().flatten(0, 1), -1)
        F.kl_div(q, p, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        float(q.detach()[0, 0])  # a loop that logs its loss waits here too
    return row_of(clock.milliseconds(), args)


def body_linear(module: torch.nn.Module, name: str) -> bool:
    """Whether torchao quantizes it: every linear layer but the head, as here."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def reset_peak() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def row_of(milliseconds: list[float], args: dict[str, str]) -> dict[str, Any]:
    hidden, layers, mlp, heads, kv_heads, vocab, _ = SHAPES[args.get("shape", "1b")]
    batch, seq = int(args.get("batch", 8)), int(args.get("seq", 1024))
    head_dim = hidden // heads
    body = layers * (2 * hidden * hidden + 2 * hidden * kv_heads * head_dim + 3 * hidden * mlp)
    attention = layers * 2 * seq * hidden  # FLOP a token forward, causal: half of Q K^T and P V
    live = 0 if args.get("teacher") in ("hidden", "topk") else 1
    per_token = (
        (6 + 2 * live) * body + (3 + live) * attention + (6 + 2 * (args.get("teacher") != "topk")) * hidden * vocab
    )
    ms = statistics.median(milliseconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    tokens = int(args.get("devices", 1)) * batch * seq
    return {"ms": ms, "spread_ms": max(milliseconds) - min(milliseconds), "tokens_per_s": tokens / ms * 1000,
            "mfu": per_token * batch * seq / (ms / 1000) / PEAK, "peak_gib": peak}  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    return (f"{row['setting']:64s} {row['ms']:8.1f} ms (+-{row['spread_ms']:.1f}) {row['tokens_per_s']:9,.0f} tok/s "
            f"MFU {100 * row['mfu']:4.1f} % {row['peak_gib']:6.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
