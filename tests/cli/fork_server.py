"""Runs the real command line many times for the price of one import.

A server process imports the verbs once; for every command it forks, and the child calls `kdqat.cli.main.main` with
that argv, in its own folder, with its own stdout and stderr, and ends with main's exit code. What a child does to its
modules is gone with it.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """A command that ended; `code` is negative if a signal killed it."""

    code: int
    out: str
    err: str


class Command:
    """A command that runs."""

    def __init__(self, server: Server, pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder = server, pid, folder

    def running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Done:
        code = self.server.ask({"wait": self.pid})
        return Done(code, (self.folder / ".stdout").read_text(), (self.folder / ".stderr").read_text())


class Server:
    """The client's end."""

    def __init__(self) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, *argv: str, before: str | None = None, **env: str) -> Command:
        """Start `kdqat argv...` in `folder`.

        Args:
            before: "module:function" that the child calls first, to break something on purpose.
            env: further environment variables.
        """
        question = {"argv": [str(a) for a in argv], "cwd": str(folder), "before": before, "env": env}
        return Command(self, self.ask(question), folder)

    def run(self, folder: Path, *argv: str, before: str | None = None, **env: str) -> Done:
        """Start a command and wait for its end."""
        return self.start(folder, *argv, before=before, **env).wait()


@functools.cache
def server() -> Server:
    """The one server of this pytest process."""
    made = Server()
    atexit.register(made.process.kill)
    return made


def _child(question: dict[str, Any]) -> int:
    os.chdir(question["cwd"])
    os.environ.update({"KDQAT_CACHE": str(ROOT / ".pytest_cache" / "kdqat"), **question["env"]})
    for name, stream in ((".stdout", 1), (".stderr", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["kdqat", *question["argv"]]
    code = 0
    try:
        if question["before"]:
            module, _, function = question["before"].partition(":")
            getattr(importlib.import_module(module), function)()
        from kdqat.cli.main import main
        from kdqat.exporters import parity_reader
        from tests.exporters.here import HERE

        if "READER_ALONE" not in question["env"]:  # this child is a process of its own already
            parity_reader.subprocess = HERE  # type: ignore[assignment]

        main(question["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Answer questions on stdin until it closes. Started as a script."""
    import torch

    import kdqat.cli.verbs  # noqa: F401
    from kdqat import api
    from kdqat.cli.parser import parse_recipe
    from kdqat.data import TextSource, windows
    from kdqat.models.toy import toy_model, toy_tokenizer
    from tests.cli.recipes import write

    torch.set_num_threads(1)
    toy_model("llama")  # imports what transformers imports late
    windows([TextSource(path="kdqat:prose")], toy_tokenizer(), 64)
    for name in ("tensorboard.summary.writer.event_file_writer", "torch.utils.tensorboard", "transformers.generation"):
        importlib.import_module(name)
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:  # what torch sets up at the first plan takes half a second
        recipe = parse_recipe(write(Path(folder)))
        api.plan_memory(recipe.model, recipe.data, recipe.trainer)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                os._exit(_child(question))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()


def run(folder: Path, *argv: str) -> str:
    """stdout of a command that must succeed."""
    done = server().run(folder, *argv)
    assert done.code == 0, done.err
    return done.out
