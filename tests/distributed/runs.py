"""Recipes for one and for two processes, starting them, and reading what they left."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from kdqat.models.toy import toy_model, toy_tokenizer
from tests.cli.fork_server import server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 6
SEQ_LEN, VAL_ROWS = 80, 4
TEMPLATE = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}"
TEXT = "quantized weights learn their scales from the teacher while rounding hides what is lost on the grid"

OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

SINGLE: dict[str, Any] = {"devices": 1}
DDP: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
SHARDED = {"shard": True}


def fsdp2(*, save_distributed_checkpoint: bool = False) -> dict[str, Any]:
    """Trainer arguments; with the recipe's model.parallel.shard."""
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return {
        "devices": 2,
        "strategy": {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {**sizes, "save_distributed_checkpoint": save_distributed_checkpoint},
        },
    }


STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {"ddp": (DDP, {}), "fsdp2": (fsdp2(), SHARDED)}


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    """A class of `disturb` in a recipe."""
    return {"class_path": f"disturb.{name}", "init_args": arguments}


def write_inputs(folder: Path) -> None:
    """The model and the conversations that all recipes of `folder` name.

    The models are toy:llama, head tied and untied, their matrices eight times as wide, so that 4 bits cost a KL that
    float32 resolves. Answers have between 1 and 60 characters, so that no two micro-batches weigh alike.
    """
    for name, tie in (("model", True), ("untied", False)):
        model = toy_model("llama", tie=tie)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
        model.save_pretrained(folder / name)
        toy_tokenizer().save_pretrained(folder / name)
    draw = random.Random(0)
    lines = []
    for number in range(44):
        answer = " ".join(draw.choices(TEXT.split(), k=20))[: draw.choice([1, 4, 20, 60])]
        turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")


def write_recipe(
    folder: Path,
    name: str,
    trainer: dict[str, Any],
    *,
    model: str = "model",
    parallel: dict[str, bool] | None = None,
    batch_size: int = 2,
    accumulate: int = 2,
    precision: str = "32-true",
    scheme: Any = "W4A16_G32",
    quantizer: str = "LSQ",
    calibration: dict[str, Any] | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    chunk_tokens: int = 1024,
    select: str = "last",
    callbacks: tuple[dict[str, Any], ...] = (),
    evaluate: bool = False,
    clip: float | None = 0.05,
) -> Path:
    """The recipe `folder/name.yaml`, with its run directory at `folder/name`."""
    checkpoints = {"every_n_steps": 2, "keep_last": 9, "select": select}
    content: dict[str, Any] = {
        "seed_everything": 0,
        "model": {
            "student": {"path": str(folder / model)},
            "teacher": {"class_path": "FrozenTeacher", "init_args": {"dtype": "float32"}},
            "plan": {"class_path": "Uniform", "init_args": {"scheme": scheme, "ignore": list(ignore)}},
            "quantizer": {"class_path": quantizer},
            "calibration": calibration,
            "initializer": {"class_path": "RTN"},
            "loss": {"class_path": "ForwardKL", "init_args": {"chunk_tokens": chunk_tokens}},
            "optimizer": {  # a large eps lets a wrong size of the gradients show, which AdamW else divides away
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1.0e-3, "weight_decay": 0.01, "eps": 1.0e-3},
            },
            "scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 1}},
            "scale_lr_ratio": 1.0,
            "parallel": parallel or {},
        },
        "data": {
            "class_path": "ChatTurns",
            "init_args": {
                "path": str(folder / "chats.jsonl"),
                "chat_template": TEMPLATE,
                "seq_len": SEQ_LEN,
                "batch_size": batch_size,
                "val_rows": VAL_ROWS,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": precision,
            "max_steps": STEPS,
            "accumulate_grad_batches": accumulate,
            "gradient_clip_val": clip,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 2 * accumulate,
            "default_root_dir": str(folder / name),
            "callbacks": [
                callback("BlankRows"),
                *callbacks,
                {"class_path": "kdqat.training.Checkpoints", "init_args": checkpoints},
            ],
            **trainer,
        },
    }
    if evaluate:
        text = {"text": "kdqat:prose", "seq_len": 64, "limit": 2}
        content["evaluate"] = [{"class_path": "TeacherAgreement", "init_args": text}]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def environment(rank: int | None = None, world_size: int = 1, port: int = 0) -> dict[str, str]:
    """One thread a process, and for `rank` what torchrun would set."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{HERE}"}
    for key in OF_TORCHRUN:
        env.pop(key, None)
    if rank is not None:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return env


class Jobs:
    """`kdqat` calls that share their processes: `add` them, `run` them, then ask for what they left."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.calls: dict[str, list[str]] = {}
        self.results: list[dict[str, dict[str, Any]]] = []  # of each rank, by job
        self.logs: list[str] = []

    def add(self, name: str, *arguments: Any, **recipe: Any) -> None:
        """Fit the recipe made of `arguments` and `recipe` (see `write_recipe`)."""
        self.calls[name] = ["fit", str(write_recipe(self.folder, name, *arguments, **recipe))]

    def add_stopped(
        self, name: str, *arguments: Any, callbacks: tuple[dict[str, Any], ...] = (), **recipe: Any
    ) -> None:
        """Fit the recipe as `name`, and as `name`_stopped once more, with a signal on the way, and resume that one."""
        self.add(name, *arguments, callbacks=callbacks, **recipe)
        stopped = (*callbacks, callback("StopRankZero", at=4))
        self.add(f"{name}_stopped", *arguments, callbacks=stopped, **recipe)
        self.resume(f"{name}_stopped")

    def resume(self, name: str) -> None:
        """Go on with an earlier job."""
        self.calls[f"{name}, resumed"] = [*self.calls[name], "--resume"]

    def validate(self, name: str) -> None:
        """`kdqat validate` on the student of an earlier job."""
        self.calls[f"{name}, validated"] = ["validate", self.calls[name][1]]

    def run(self, num_processes: int, timeout: float = 300) -> Jobs:
        """Run all jobs, one after another, in the same processes."""
        file, prefix = self.folder / f"{self.label}.jobs.json", self.folder / self.label
        file.write_text(json.dumps(self.calls))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        commands = []
        for rank in range(num_processes):
            env = environment(rank, num_processes, port) if num_processes > 1 else environment()
            mine = {key: env[key] for key in (*OF_TORCHRUN, "KDQAT_CACHE") if key in env}
            where = self.folder / f"{self.label}.{rank}"
            where.mkdir()
            commands.append(server().start(where, file, prefix, before="tests.distributed.worker:work", **mine))
        deadline = time.monotonic() + timeout
        while any(command.running() for command in commands):
            time.sleep(0.05)
            if time.monotonic() > deadline:
                for command in commands:
                    command.kill()
        for command in commands:
            command.wait()
        logs = [prefix.with_suffix(f".rank{rank}.log") for rank in range(num_processes)]
        self.logs = [path.read_text() for path in logs]
        self.results = [json.loads(Path(f"{prefix}.rank{rank}.json").read_text()) for rank in range(num_processes)]
        return self

    def codes(self, name: str) -> list[int | str]:
        """The job's exit code on each rank."""
        return [results[name]["code"] for results in self.results]


def kdqat(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`kdqat ...` as a user types it; Lightning starts the second process."""
    command = [sys.executable, "-m", "kdqat", *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=timeout)


def curve(run: Path, column: str) -> dict[int, float]:
    """A column of metrics.csv by step."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def checkpoint(run: Path, step: int = STEPS) -> dict[str, Any]:
    """What the checkpoint of `step` holds."""
    return torch.load(run / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)


def curve_difference(a: Path, b: Path, column: str = "train/kl") -> float:
    """The largest relative one between two runs' curves; infinite if they have other steps."""
    ours, theirs = curve(a, column), curve(b, column)
    if not ours or ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in ours)


def weight_difference(a: Path, b: Path) -> float:
    """The largest absolute one between two runs' last weights and scales; infinite if they have other keys."""
    ours, theirs = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


def require_same_training(ours: Path, theirs: Path) -> None:
    """Fail unless two runs, of however many processes, have the same curves and end with the same weights."""
    for column in ("train/kl", "train/grad_norm"):
        difference = curve_difference(ours, theirs, column)
        assert difference < 1e-5, f"{ours.name}, {column}: {difference:.1e}"
    difference = weight_difference(ours, theirs)
    assert difference < 1e-6, f"{ours.name}, weights: {difference:.1e}"


def require_same_end(jobs: Jobs, name: str) -> None:
    """Fail unless what `add_stopped` stopped and resumed has every bit of the uninterrupted run."""
    codes = [jobs.codes(job) for job in (name, f"{name}_stopped", f"{name}_stopped, resumed")]
    assert codes == [[0, 0], [143, 0], [0, 0]], f"{codes}\n{jobs.logs[0][-3000:]}"
    whole, stopped = jobs.folder / name, jobs.folder / f"{name}_stopped"
    assert curve(stopped, "train/kl") == curve(whole, "train/kl") != {}
    assert weight_difference(stopped, whole) == 0
