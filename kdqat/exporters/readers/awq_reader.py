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

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # `python -I` leaves it out

from packed_folder import answer_with, linears_in_floats, packed_layers, put_weight, tensors_of

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
    tensors, found = tensors_of(folder), {}
    for name in packed_layers(tensors):
        assert not left_alone(name, config), f"{name} is quantized but `modules_to_not_convert` says that it is not"
        codes, zeros = (unpack(tensors.pop(f"{name}.{key}")) for key in ("qweight", "qzeros"))
        scales = tensors.pop(f"{name}.scales").astype(np.float32)
        size = config["group_size"] if config["group_size"] != -1 else len(codes)
        assert len(scales) * size == len(codes), f"{name}: {len(scales)} groups of {size} for {len(codes)} inputs"
        found[f"codes/{name}"], found[f"zero_points/{name}"] = codes.T.astype(np.uint8), zeros.T.astype(np.uint8)
        put_weight(name, tensors, found, codes, zeros, scales, np.arange(len(codes)) // size)
    for name in linears_in_floats(folder, found):
        assert left_alone(name, config), f"{name} is in floats, which `modules_to_not_convert` does not say"
    answer_with(folder, tensors, found, request, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
