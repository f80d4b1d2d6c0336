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
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file


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
    tensors: dict = {}
    found: dict = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_numpy(file)
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        qweight, qzeros, scales, g_idx = (tensors.pop(f"{name}.{k}") for k in ("qweight", "qzeros", "scales", "g_idx"))
        own = settings_of(name, config)
        assert own is not None, f"{name} is quantized but `dynamic` says that it is not"
        codes = bits_of(qweight, own["bits"], 0).astype(np.int32)  # [I, O]
        size = own["group_size"] if own["group_size"] != -1 else len(codes)
        assert np.array_equal(g_idx, np.arange(len(codes)) // size), f"{name}: g_idx is not that of groups of {size}"
        assert len(scales) * size == len(codes), f"{name}: {len(scales)} groups of {size} for {len(codes)} inputs"
        zeros = bits_of(qzeros, own["bits"], 1).astype(np.int32) + (config["checkpoint_format"] == "gptq")  # [N, O]
        scales = scales.astype(np.float32)
        weight = (scales[g_idx] * (codes - zeros[g_idx]).astype(np.float32)).astype(np.float16)
        tensors[f"{name}.weight"] = np.ascontiguousarray(weight.T)
        shift = 2 ** (own["bits"] - 1) if own["sym"] else 0
        found[f"codes/{name}"], found[f"zero_points/{name}"] = codes.T - shift, zeros.T - shift
        found[f"scales/{name}"], found[f"weights/{name}"] = scales.T, tensors[f"{name}.weight"]
    assert found, "no quantized layer was read"
    plain = {key: value for key, value in tensors.items() if f"codes/{key.removesuffix('.weight')}" not in found}
    found |= {f"weights/{key.removesuffix('.weight')}": value for key, value in plain.items()}
    found = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in found.items()}
    left = [name for name in linears(folder) if f"codes/{name}" not in found and name != "lm_head"]
    for name in left:
        assert settings_of(name, config) is None, f"{name} is in floats, which `dynamic` does not say"
    assert config["lm_head"] == ("codes/lm_head" in found), "`lm_head` of the config is wrong"
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
