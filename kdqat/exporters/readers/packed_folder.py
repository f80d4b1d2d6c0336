"""What the readers of GPTQ and AWQ folders share: their tensors, and the plain model that computes with the weights.

A reader unpacks codes and scales; what it found besides, and what the plain model answers, goes the same way. Like
every file in this folder it imports no kdqat.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file


def tensors_of(folder: str) -> dict:
    """Every tensor of the folder's files, by name."""
    tensors: dict = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_numpy(file)
    return tensors


def packed_layers(tensors: Mapping[str, Any]) -> list:
    """Names of the layers that are quantized."""
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    assert names, "no quantized layer was read"
    return names


def put_weight(name: str, tensors: dict, found: dict, codes: Any, zeros: Any, scales: Any, group: Any) -> None:
    """Dequantize a layer in fp16, as engines hold it, into `tensors`, and answer with its scales and weights.

    Args:
        codes, zeros, scales: [I, O], [N, O] integers, [N, O] fp32; `group` [I] says which of N an input belongs to.
    """
    weight = (scales[group] * (codes - zeros[group]).astype(np.float32)).astype(np.float16)
    tensors[f"{name}.weight"] = np.ascontiguousarray(weight.T)
    found[f"scales/{name}"], found[f"weights/{name}"] = scales.T, tensors[f"{name}.weight"]


def answer_with(folder: str, tensors: Mapping[str, Any], found: Mapping[str, Any], request: str, answer: str) -> None:
    """Write `found`, every other tensor as `weights/NAME`, and what the plain model computes.

    Args:
        tensors: the plain model's, dequantized weights among them.
    """
    plain = {key: value for key, value in tensors.items() if f"codes/{key.removesuffix('.weight')}" not in found}
    found = dict(found) | {f"weights/{key.removesuffix('.weight')}": value for key, value in plain.items()}
    answers = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in found.items()}
    transformers.AutoTokenizer.from_pretrained(folder)  # whoever serves the folder needs it as well
    save_file(answers | _run(folder, tensors, load_file(request)), answer)


def linears_in_floats(folder: str, found: Mapping[str, Any]) -> list:
    """Names of the plain model's nn.Linear, `lm_head` left out, that `found` has no codes of."""
    with torch.device("meta"):
        model = _plain_model(folder)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linears if f"codes/{name}" not in found and name != "lm_head"]


def _plain_model(folder: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return getattr(transformers, config.architectures[0])(config).float().eval()


@torch.no_grad()
def _run(folder: str, tensors: Mapping[str, Any], request: dict) -> dict:
    model = _plain_model(folder)
    state = {key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = set(missing) <= set(model.all_tied_weights_keys)
    assert tied and not unexpected, f"missing {missing}, unexpected {unexpected}"
    output = model(**request)
    return {"logits" if "logits" in output else "hidden": output[0].contiguous()}
