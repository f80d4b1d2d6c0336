"""Runs an exporter's reader in a process of its own, which kdqat is no part of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

READERS = Path(__file__).parent / "readers"
CANNOT = 3  # a reader's exit code for "I cannot read such a model, whoever wrote it"
_OF_A_RUN = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
             "MASTER_PORT")  # fmt: skip


class ReaderFailed(Exception):
    """The reader could not read what was written."""


class CannotRead(Exception):
    """The reader says that it reads no such model at all: nothing was found out."""


@dataclass(frozen=True)
class Answer:
    """Where the reader's tensors lie, and the versions of its libraries."""

    path: Path
    versions: dict[str, str]


def ask_reader(reader: str, folder: Path, input_ids: Tensor, scratch: Path) -> Answer:
    """Let `reader` read `folder` and answer to `input_ids` [B, T].

    Args:
        reader: a file in `readers/`, or the path of another script.
        scratch: an empty folder for request and answer.

    Raises:
        ReaderFailed: with the last line of what it said, or if it imported kdqat.
        CannotRead: with its reason.
    """
    scratch = scratch.absolute()  # the reader works there
    request, answer = scratch / "request.safetensors", scratch / "answer.safetensors"
    save_file({"input_ids": input_ids.contiguous()}, request)
    script = READERS / reader  # an absolute path stays as it is
    command = [sys.executable, "-I", READERS / "launch.py", script, folder.absolute(), request, answer]
    env = {key: value for key, value in os.environ.items() if key not in _OF_A_RUN}
    # sums depend on how they are split, so as many threads as here; and it computes where the student does
    env |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=env, cwd=scratch, capture_output=True, text=True)
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    if done.returncode == CANNOT:
        raise CannotRead(said[-1])
    if done.returncode or not answer.is_file():
        raise ReaderFailed(f"the reader {script.name} failed (exit code {done.returncode}): {said[-1]}")
    note = json.loads(answer.with_name(f"{answer.name}.json").read_text())
    if "kdqat" in note["modules"]:
        raise ReaderFailed(f"the reader {script.name} imported kdqat, so that it is not independent of the exporter")
    return Answer(answer, note["versions"])
