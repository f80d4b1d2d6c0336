"""Predicted against measured memory: random Llamas of given shapes, three steps each with a live bf16 teacher.

    python tests/benchmarks/planner_check.py [SHAPE ...]

A shape is hidden,layers,mlp,heads,kv_heads,vocab,batch,seq,mode; mode is eager, compiled, selective, full, or two of
them joined by "+" (compiled+full). Without one, a list for a GPU of 80 GiB and more. On CUDA the measure is
torch.cuda.max_memory_allocated, reset before each moment of a step; the plan's share for the driver and fragmentation
is left out, because PyTorch does not count it. On the CPU (small shapes, no compiling) storages are followed instead.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdqat.allocate import Uniform
from kdqat.data import PackedText
from kdqat.initializers import RTN
from kdqat.losses import ForwardKL
from kdqat.models import FrozenTeacher, ModelSource, SplitModel
from kdqat.quant import LSQ
from kdqat.student import prepare_student
from kdqat.training import KDQATModule, Parallel, parameter_groups
from kdqat.training.planner import MemoryPlan, hardware, plan_memory
from kdqat.training.planner.live import LiveBytes
from kdqat.types import Batch

SHAPES = (
    "576,30,1536,9,3,49152,16,1024,eager",
    "576,30,1536,9,3,49152,16,1024,compiled",
    "576,30,1536,9,3,49152,16,1024,selective",
    "576,30,1536,9,3,49152,16,1024,full",
    "2048,16,8192,32,8,128256,4,2048,eager",
    "2048,16,8192,32,8,128256,4,2048,compiled",
    "2048,16,8192,32,8,128256,4,2048,compiled+selective",
    "2048,16,8192,32,8,128256,4,2048,compiled+full",
    "1024,24,4096,16,16,32000,8,4096,full",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 3


class Meter:
    """Bytes now, and the most since the last call of `peak`."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.held = live, 0

    def now(self) -> int:
        return torch.cuda.memory_allocated() if DEVICE == "cuda" else self.held + self.live.now

    def peak(self) -> int:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return most
        most, self.live.peak = self.held + self.live.peak, self.live.now
        return most


def parallel_of(mode: str) -> Parallel:
    """What a mode's words mean."""
    words = set(mode.split("+"))
    checkpoint: Any = "selective" if "selective" in words else "full" in words
    return Parallel(checkpoint_blocks=checkpoint, compile_blocks="compiled" in words)


def check(shape: str) -> tuple[MemoryPlan, dict[str, int], float]:
    """(the plan, measured bytes by moment and part, seconds of the last step) of one shape."""
    *numbers, mode = shape.split(",")
    hidden, layers, mlp, heads, kv_heads, vocab, rows, length = map(int, numbers)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=length,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        source = ModelSource(folder)
        parallel = parallel_of(mode)
        arguments: dict[str, Any] = {
            "plan": Uniform("W4A16_G32"), "quantizer": LSQ, "loss": ForwardKL(), "teacher": FrozenTeacher(),
            "optimizer": partial(torch.optim.AdamW, lr=1e-5, fused=True if DEVICE == "cuda" else None),
            "parallel": parallel,
        }  # fmt: skip
        data = PackedText("kdqat:prose", seq_len=length, batch_size=rows)
        trainer = {"accelerator": DEVICE if DEVICE == "cpu" else "gpu", "devices": 1, "precision": "bf16-mixed"}
        plan = plan_memory(KDQATModule(student=source, **arguments), data, trainer)
        with torch.device(DEVICE):
            split = SplitModel(LlamaForCausalLM(config))
        arguments["teacher"].prepare(source, split, None, pristine=True)
        student = prepare_student(source, arguments["plan"], LSQ, RTN(), split=split, tokenizer=object())
        module = KDQATModule.from_student(student, **arguments)
    measured, seconds = train(module, rows, length, vocab)
    return plan, measured, seconds


def train(module: KDQATModule, rows: int, length: int, vocab: int) -> tuple[dict[str, int], float]:
    """Three steps in Lightning's order; what the last one measured."""
    assert module.split is not None and module.teacher is not None and module.loss is not None
    assert module.optimizer_factory is not None
    split, teacher, loss = module.split.train(), module.teacher, module.loss
    module.parallel.apply(split, None)
    teacher.place(torch.device(DEVICE))
    optimizer = module.optimizer_factory(parameter_groups(split))
    ids = torch.randint(0, vocab, (rows, length), device=DEVICE)
    batch = Batch(ids, ids)
    measured: dict[str, int] = {}
    with ExitStack() as stack:
        live = LiveBytes()
        if DEVICE == "cpu":
            stack.enter_context(live)
        meter = Meter(live)
        if DEVICE == "cpu":
            tensors = [*split.parameters(), *split.buffers(), *teacher.split.parameters()]  # type: ignore[attr-defined]
            meter.held = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        measured["student weights + teacher"] = meter.now()
        for _ in range(STEPS):
            started = time.perf_counter()
            optimizer.zero_grad()  # as KDQATModule.on_train_batch_start does
            meter.peak()
            with torch.autocast(DEVICE, torch.bfloat16):
                theirs = teacher.outputs(batch, loss.wants)
                measured["teacher's forward pass"] = meter.peak()
                ours = split(batch, loss.wants)
                measured["activations + copies + fake quantization"] = meter.now()
                parts = loss(ours, theirs, batch)
            measured["loss"] = meter.peak()
            (parts.sum / parts.num).backward()
            del ours, theirs, parts
            measured["backward"] = meter.peak()
            measured["gradients"] = sum(p.grad.nbytes for p in split.parameters() if p.grad is not None)
            before = meter.now()
            optimizer.step()
            measured["optimizer step"] = meter.peak()
            state = meter.now() - before
            measured["optimizer state"] = max(measured.get("optimizer state", 0), state)
            seconds = time.perf_counter() - started
    held = measured["optimizer state"] + measured["student weights + teacher"]
    measured["activations + copies + fake quantization"] -= held
    return measured, seconds


def predicted(plan: MemoryPlan) -> dict[str, int]:
    """The plan in the words of `train`, without what PyTorch's allocator does not count."""
    workspace = hardware.CUDA_WORKSPACE if DEVICE == "cuda" else 0
    moments = {n: sum(m.values()) - m["other"] + workspace for n, m in plan.moments.items()}
    loss = plan.moments["loss"]
    return {
        "student weights + teacher": loss["student weights"] + loss["teacher"],
        "gradients": plan.moments["optimizer step"]["gradients"],
        "optimizer state": loss["optimizer state"],
        "activations + copies + fake quantization": sum(
            loss[part] for part in ("activations", "weight copies", "fake quantization", "teacher's pass")
        ),
        "teacher's forward pass": moments["teacher's forward pass"],
        "loss": moments["loss"],
        "backward": max(moments["start of backward"], moments["end of backward"]),
        "optimizer step": moments["optimizer step"],
    }


def main(*shapes: str) -> None:
    for shape in shapes or SHAPES:
        torch._dynamo.reset()
        plan, measured, seconds = check(shape)
        said = predicted(plan)
        print(f"\n{shape}\n{'':42s}{'predicted':>12s}{'measured':>12s}{'error':>8s}", flush=True)
        for name in said:
            print(line(name, said[name], measured[name]))
        moments = ("teacher's forward pass", "loss", "backward", "optimizer step")
        print(line("PEAK", max(said[m] for m in moments), max(measured[m] for m in moments)))
        if plan.seconds_per_step is not None:
            print(f"{'seconds a step':42s}{plan.seconds_per_step:12.3f}{seconds:12.3f}", flush=True)


def line(name: str, said: int, measured: int) -> str:
    """A row of the table, in MiB."""
    error = f"{100 * (said - measured) / measured:+7.1f}%" if measured else ""
    return f"{name:42s}{said / 2**20:12,.1f}{measured / 2**20:12,.1f}{error:>8s}"


if __name__ == "__main__":
    main(*sys.argv[1:])
