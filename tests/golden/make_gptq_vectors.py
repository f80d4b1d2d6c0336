"""Codes of llm-compressor's GPTQ on small random layers: makes gptq_vectors.safetensors beside this file.

It pins older packages than kdqat's, so it runs in an environment of its own:

    python3.11 -m venv /tmp/llmc && /tmp/llmc/bin/pip install torch==2.13.0 "llmcompressor==0.14.*"
    /tmp/llmc/bin/python tests/golden/make_gptq_vectors.py

Weights and inputs are random numbers of ours. Scales are compressed-tensors' min-max ones of the weight as given, for
llm-compressor finds none on the way: kdqat's `static_groups`. Symmetric ones are absmax / 7.5 (`absmax_half`).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import save_file

CASES = {  # name: bits, group size (0: by channel), symmetric, act order
    "w4_g32_sym": (4, 32, True, False),
    "w4_g32_sym_order": (4, 32, True, True),
    "w4_g16_asym": (4, 16, False, False),
    "w3_g32_asym_order": (3, 32, False, True),
    "w3_channel_sym": (3, 0, True, False),
    "w8_channel_asym": (8, 0, False, False),
}
OUT, IN, TOKENS = 24, 160, 640  # more columns than one block of 128


def main() -> None:
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    inputs = torch.randn(TOKENS, IN, generator=generator) @ mixing  # correlated features
    weight = torch.randn(OUT, IN, generator=generator)
    tensors = {"weight": weight, "hessian": inputs.T @ inputs}
    for name, (bits, group_size, symmetric, act_order) in CASES.items():
        args = QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=symmetric,
            strategy="group" if group_size else "channel",
            group_size=group_size or None,
            actorder="weight" if act_order else None,
        )
        groups = weight.reshape(OUT, -1, group_size or IN)
        scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), args)
        values, _, fallback = quantize_weight(
            weight[None].clone(), tensors["hessian"][None].clone(), scale[None], zero_point[None], None, args
        )
        assert not fallback.any()
        columns = torch.arange(IN) // (group_size or IN)
        codes = torch.round(values[0] / scale[:, columns]) + zero_point[:, columns]
        tensors[f"{name}.codes"] = codes.to(torch.int16)
        tensors[f"{name}.scale"] = scale.float()
        tensors[f"{name}.zero_point"] = zero_point.float()
    made_by = {package: version(package) for package in ("llmcompressor", "compressed-tensors", "torch")}
    save_file(tensors, Path(__file__).with_name("gptq_vectors.safetensors"), metadata=made_by)
    print(made_by)


if __name__ == "__main__":
    main()
