"""One process of a run, or the only one: calls the command line for a list of jobs, one after another.

It takes JOBS.json and RESULTS_PREFIX where a command has its arguments. RANK, LOCAL_RANK and WORLD_SIZE come from the
environment, as torchrun sets them. A job is the argument list of one `kdqat` call. Writes RESULTS_PREFIX.rank0.json
(and so on): the exit code of every job and the files this rank made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

written: list[str] = []


def note_writes(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: the paths that this process creates, writes or renames to."""
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and args[1][0] in "wxa":
        written.append(args[0])
    elif event == "os.mkdir":
        written.append(str(args[0]))
    elif event == "os.rename":
        written.append(str(args[1]))


def run(arguments: list[str]) -> int | str:
    """The exit code of one call; the traceback if it raised anything but SystemExit."""
    from kdqat.cli.main import main

    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else str(stop.code)
    except BaseException:
        traceback.print_exc()
        return traceback.format_exc()
    return 0


def find_disturb() -> None:
    """Let recipes name the classes of disturb.py."""
    sys.path.insert(0, str(Path(__file__).parent))


def work() -> None:
    """Run the jobs, in a process that `fork_server.py` forked; stderr goes to RESULTS_PREFIX.rank0.log (and so on)."""
    jobs, prefix = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    rank = os.environ.get("RANK", "0")
    log = os.open(f"{prefix}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    find_disturb()
    sys.addaudithook(note_writes)
    results: dict[str, Any] = {}
    for name, arguments in jobs.items():
        print(f"-- {name} on rank {rank}", file=sys.stderr, flush=True)
        written.clear()
        code = run(arguments)
        restored = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        results[name] = {"code": code, "written": sorted(set(written)), "sigterm_restored": restored}
        Path(f"{prefix}.rank{rank}.json").write_text(json.dumps(results, indent=1))
    sys.exit(0)
