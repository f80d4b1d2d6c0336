"""The serving engine runs what was exported: llama.cpp where it is installed, and one that says what it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from kdqat.exporters import GGUF
from kdqat.exporters.parity import verify_export
from kdqat.exporters.parity_engine import LIMIT, NUM_TOKENS, ask_engine
from tests.exporters.gguf_students import exported, trained
from tests.models.stories import stories260k

ENGINE = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
def main(folder, request, answer):
    told = load_file(Path(folder) / "told")["nll"]
    assert load_file(request)["input_ids"].shape == (1, told.shape[1] + 1)
    if not told.numel():
        print("too small for me", file=sys.stderr)
        raise SystemExit(3)
    save_file({"nll": told}, answer)
if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Told(GGUF):
    """Its engine answers with FOLDER/told."""

    engine: ClassVar[str] = ""

    def engine_missing(self) -> str | None:
        return None


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Path:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    monkeypatch.setattr(Told, "engine", str(script))
    return tmp_path


def asked(folder: Path, difference: float, num_tokens: int = 60):
    """What comes of an engine whose every token has `difference` more nats than the student's."""
    from safetensors.torch import save_file

    ids = torch.randint(0, 20, (2, num_tokens), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, num_tokens, 20, generator=torch.Generator().manual_seed(1))
    seen = min(num_tokens, NUM_TOKENS)
    nll = F.cross_entropy(logits[0, : seen - 1], ids[0, 1:seen], reduction="none")[None] + difference
    save_file({"nll": nll}, folder / "told")
    return ask_engine(Told(), folder, ids, logits, folder / f"scratch{difference}{num_tokens}")


def test_an_engine_that_predicts_as_the_student_does_is_no_fault_and_its_numbers_are_kept(engine):
    numbers, fault = asked(engine, 0.1)
    assert fault is None and numbers["tokens"] == NUM_TOKENS - 1 and numbers["versions"]["torch"]
    assert numbers["nll_difference"] == pytest.approx(0.1, abs=1e-5)
    assert numbers["perplexity"] == pytest.approx(numbers["student_perplexity"] * 1.10517, rel=1e-4)


@pytest.mark.parametrize("difference", [LIMIT + 0.1, -LIMIT - 0.1, float("nan")])
def test_an_engine_that_predicts_something_else_is_a_fault(engine, difference):
    _, fault = asked(engine, difference)
    assert fault is not None and "nats on average" in fault


def test_an_engine_that_cannot_run_such_a_model_is_no_fault_and_one_that_fails_is(engine):
    said, fault = asked(engine, 0.0, num_tokens=1)
    assert said == "cannot run this model: too small for me" and fault is None
    (engine / "engine.py").write_text("def main(*_): raise OSError('no such file')\nmain()")
    said, fault = asked(engine, 0.0)
    assert said.startswith("failed: ") and fault is not None and "no such file" in fault


def test_an_engine_that_is_not_installed_is_said_in_parity_json(tmp_path, monkeypatch):
    monkeypatch.setattr(GGUF, "engine_missing", lambda self: "xllamacpp; pip install it")
    student = trained("toy:llama", "GGUF_Q4_0")
    parity = verify_export(student, GGUF(), exported(student, tmp_path / "out"))
    assert parity.verified
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["engine"] == "not run: xllamacpp; pip install it"


def test_llama_cpp_is_asked_for_stories260k_and_finds_rows_of_q_in_a_wrong_order(tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    student = trained(stories260k(), "GGUF_Q4_0", ignore=("lm_head", "down"), lr=1e-4)
    parity = verify_export(student, GGUF(), exported(student, tmp_path / "out"))
    assert parity.verified and parity.numbers["engine"]["nll_difference"] < 0.1
    monkeypatch.setattr("kdqat.exporters.gguf.to_neighbours", lambda blocks, *_: blocks)
    worse = verify_export(student, GGUF(), exported(student, tmp_path / "wrong"))
    engine = worse.numbers["engine"]
    assert worse.rejected and engine["nll_difference"] > 3 * parity.numbers["engine"]["nll_difference"]
