"""A reader of exports run inside this process: one of its own costs seconds of imports."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """What `parity_reader` asks of `subprocess.run`, without a process."""
    reader, answer, before = command[3], Path(command[6]), sys.argv
    answer.with_name(f"{answer.name}.json").write_text(json.dumps({"modules": [], "versions": {}}))
    sys.argv = command[3:]
    try:
        runpy.run_path(reader, run_name="__main__")
    except SystemExit as end:
        return subprocess.CompletedProcess(command, end.code, "", "it cannot")
    except Exception as error:
        return subprocess.CompletedProcess(command, 1, "", f"Traceback\n{type(error).__name__}: {error}")
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(command, 0, "", "")


HERE = SimpleNamespace(run=run_here)  # in place of the module `subprocess` in kdqat.exporters.parity_reader
