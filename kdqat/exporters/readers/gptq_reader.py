"""Reads a GPTQ folder from the description of its layout, in numpy, and runs the plain model. Knows no kdqat.

    python -I gptq_reader.py FOLDER REQUEST.safetensors ANSWER.safetensors

No library that loads GPTQ installs beside a CPU build of torch, so this follows AutoGPTQ's documentation bit by bit: a
row of `qweight` holds 32 / b inputs (for 3 bits, three rows hold 32), the lowest bits first, `qzeros` the outputs
likewise, `g_idx` the group of each input; version 1 stores zero - 1. REQUEST holds input_ids [B, T] (and
attention_mask); ANSWER gets `logits` (`hidden` without a head), `codes/NAME` [O, I] (signed where the layer is
symmetric), `scales/NAME`, `zero_points/NAME` [O, N] (0 where symmetric) and `weights/NAME` in fp16, as
engines hold them; the model computes with these in fp32.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # `python -I` leaves it out

from packed_folder import answer_with, linears_in_floats, packed_layers, put_weight, tensors_of


def bits_of(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned numbers of `bits` bits along `axis` of int32 words, read from a string of single bits."""
    words = np.moveaxis(words, axis, -1)
    octets = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    single = np.unpackbits(octets, axis=-1, bitorder="little").reshape(*words.shape[:-1], -1, bits)
    return np.moveaxis((single << np.arange(bits)).sum(-1), -1, axis)


def settings_of(name: str, config: dict) -> dict | None:
    """bits, group_size and sym of a layer: the first of GPTQModel's `dynamic` rules that matches overrides the folder's
    own; None: it is not quantized."""
    override: dict = {}
    for rule, its_own in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), name):
            if rule.startswith("-:"):
                return None
            override = its_own
            break
    return {key: override.get(key, config[key]) for key in ("bits", "group_size", "sym")}


def main(folder: str, request: str, answer: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert config == json.loads((Path(folder) / "quantize_config.json").read_text())
    assert config["quant_method"] == "gptq" and not config["desc_act"]
    tensors, found = tensors_of(folder), {}
    for name in packed_layers(tensors):
        qweight, qzeros, scales, g_idx = (tensors.pop(f"{name}.{k}") for k in ("qweight", "qzeros", "scales", "g_idx"))
        own = settings_of(name, config)
        assert own is not None, f"{name} is quantized but `dynamic` says that it is not"
        codes = bits_of(qweight, own["bits"], 0).astype(np.int32)  # [I, O]
        size = own["group_size"] if own["group_size"] != -1 else len(codes)
        assert np.array_equal(g_idx, np.arange(len(codes)) // size), f"{name}: g_idx is not that of groups of {size}"
        assert len(scales) * size == len(codes), f"{name}: {len(scales)} groups of {size} for {len(codes)} inputs"
        zeros = bits_of(qzeros, own["bits"], 1).astype(np.int32) + (config["checkpoint_format"] == "gptq")  # [N, O]
        scales = scales.astype(np.float32)
        shift = 2 ** (own["bits"] - 1) if own["sym"] else 0
        found[f"codes/{name}"], found[f"zero_points/{name}"] = codes.T - shift, zeros.T - shift
        put_weight(name, tensors, found, codes, zeros, scales, g_idx)
    for name in linears_in_floats(folder, found):
        assert settings_of(name, config) is None, f"{name} is in floats, which `dynamic` does not say"
    assert config["lm_head"] == ("codes/lm_head" in found), "`lm_head` of the config is wrong"
    answer_with(folder, tensors, found, request, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
