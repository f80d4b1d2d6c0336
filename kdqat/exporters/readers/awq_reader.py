"""Reads an AWQ (GEMM) folder from the description of its layout, in numpy, and runs the plain model. Knows no kdqat.

    python -I awq_reader.py FOLDER REQUEST.safetensors ANSWER.safetensors

No library that loads AWQ installs beside a CPU build of torch, so this follows AutoAWQ's layout: `qweight` [I, O / 8]
and `qzeros` [N, O / 8] hold eight outputs in a word of eight nibbles; the nibbles from the lowest up belong to outputs
0, 2, 4, 6, 1, 3, 5, 7; `scales` [N, O]. REQUEST holds input_ids [B, T] (and attention_mask); ANSWER gets `logits`
(`hidden` without a head), `codes/NAME` [O, I] and `zero_points/NAME` [O, N], unsigned, `scales/NAME`, and
`weights/NAME` in fp16, as engines hold them; the model computes with these in fp32. Codes are uint8: they count from 0
in symmetric layers, too.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 [rows, O / 8] -> [rows, O]."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    outputs = [(unsigned >> (4 * nibble)) & 15 for nibble in NIBBLE_OF_OUTPUT]
    return np.stack(outputs, -1).reshape(len(words), -1).astype(np.int32)


def left_alone(name: str, config: dict) -> bool:
    return any(part in name for part in config["modules_to_not_convert"])


def main(folder: str, request: str, answer: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", 4)
    assert config["zero_point"] is True, "`zero_point` must be true where there are zero points"
    tensors: dict = {}
    found: dict = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_numpy(file)
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        assert not left_alone(name, config), f"{name} is quantized but `modules_to_not_convert` says that it is not"
        codes, zeros = (unpack(tensors.pop(f"{name}.{key}")) for key in ("qweight", "qzeros"))
        scales = tensors.pop(f"{name}.scales").astype(np.float32)
        size = config["group_size"] if config["group_size"] != -1 else len(codes)
        assert len(scales) * size == len(codes), f"{name}: {len(scales)} groups of {size} for {len(codes)} inputs"
        group = np.arange(len(codes)) // size
        weight = (scales[group] * (codes - zeros[group]).astype(np.float32)).astype(np.float16)
        tensors[f"{name}.weight"] = np.ascontiguousarray(weight.T)
        found[f"codes/{name}"], found[f"zero_points/{name}"] = codes.T.astype(np.uint8), zeros.T.astype(np.uint8)
        found[f"scales/{name}"], found[f"weights/{name}"] = scales.T, tensors[f"{name}.weight"]
    assert found, "no quantized layer was read"
    plain = {key: value for key, value in tensors.items() if f"codes/{key.removesuffix('.weight')}" not in found}
    found |= {f"weights/{key.removesuffix('.weight')}": value for key, value in plain.items()}
    found = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in found.items()}
    for name in linears(folder):
        packed = f"codes/{name}" in found or name == "lm_head"
        assert packed or left_alone(name, config), f"{name} is in floats, which `modules_to_not_convert` does not say"
    transformers.AutoTokenizer.from_pretrained(folder)  # whoever serves the folder needs it as well
    save_file(found | run(folder, tensors, load_file(request)), answer)


def plain_model(folder: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return getattr(transformers, config.architectures[0])(config).float().eval()


def linears(folder: str) -> list:
    with torch.device("meta"):
        model = plain_model(folder)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@torch.no_grad()
def run(folder: str, tensors: dict, request: dict) -> dict:
    """What the plain model computes with these weights, in fp32."""
    model = plain_model(folder)
    state = {key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = set(missing) <= set(model.all_tied_weights_keys)
    assert tied and not unexpected, f"missing {missing}, unexpected {unexpected}"
    output = model(**request)
    return {"logits" if "logits" in output else "hidden": output[0].contiguous()}


if __name__ == "__main__":
    main(*sys.argv[1:])
