"""Reading an export in this process: a reader of its own costs seconds, and only the contract needs to see it alone."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.examples import PAGES, SOURCE


@pytest.fixture
def reader_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers run inside this process, and everything else of the gate as it is."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        reader, answer = command[3], Path(command[6])
        monkeypatch.setattr(sys, "argv", command[3:])
        answer.with_name(f"{answer.name}.json").write_text(json.dumps({"modules": [], "versions": {}}))
        try:
            runpy.run_path(reader, run_name="__main__")
        except SystemExit as end:
            return subprocess.CompletedProcess(command, end.code, "", "it cannot")
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"Traceback\n{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("kdqat.exporters.parity_reader.subprocess.run", run)


@pytest.fixture(scope="module")
def codes_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The exporter of docs/extending/exporter.md, with its reader beside it."""
    folder = tmp_path_factory.mktemp("codes_file")
    for text, name in SOURCE.findall((PAGES / "exporter.md").read_text()):
        (folder / f"{name}.py").write_text(text)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    sys.modules.pop("codes_file", None)
    try:
        return importlib.import_module("codes_file").CodesFile
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("codes_file", None)
