"""Lines for the "Use" section of a model card: whole programs with their imports, of what the model is.

A decoder is served and writes text; an encoder is loaded, and gives hidden states or logits. Who has neither vLLM nor
SGLang can run each Python program as it stands.
"""

from __future__ import annotations

from types import SimpleNamespace

from kdqat.models.source import auto_class
from kdqat.student import Student


def writes_text(student: Student) -> bool:
    """Whether the model is a decoder with its head."""
    return student.split.family.causal and student.split.has_head


def served(student: Student, folder: str, *options: str) -> dict[str, str]:
    """The commands of vLLM and SGLang, with `options` behind; none for what writes no text."""
    if not writes_text(student):
        return {}
    return {
        "vLLM": " ".join(["vllm serve", folder, *options]),
        "SGLang": " ".join(["python -m sglang.launch_server --model-path", folder, *options]),
    }


def loaded(student: Student, folder: str, *, package: str = "", config: str = "") -> dict[str, str]:
    """The program that loads the folder in transformers and asks it something.

    Args:
        package: what it takes besides transformers.
        config: a call that makes the quantization config, e.g. "CompressedTensorsConfig(dequantize=True)".
    """
    cls = auto_class(SimpleNamespace(architectures=[type(student.model).__name__])).__name__  # as config.json will say
    names = sorted([cls, "AutoTokenizer", *([config.partition("(")[0]] if config else [])])
    argument = f", quantization_config={config}" if config else ""
    lines = [
        *([f"# pip install {package}"] if package else []),
        f"from transformers import {', '.join(names)}",
        "",
        f'model = {cls}.from_pretrained("{folder}"{argument})',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
    if writes_text(student):
        lines += [
            'prompt = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))",
        ]
    else:
        answer = "logits" if student.split.has_head else "last_hidden_state"
        lines += ['tokens = tokenizer(["a sentence"], return_tensors="pt")', f"print(model(**tokens).{answer})"]
    return {"transformers": "\n".join(lines)}
