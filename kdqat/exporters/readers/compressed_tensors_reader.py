"""Reads a compressed-tensors folder with transformers and compressed-tensors, as its users do. Knows no kdqat.

    python -I compressed_tensors_reader.py FOLDER REQUEST.safetensors ANSWER.safetensors

REQUEST holds input_ids [B, T] (and attention_mask); ANSWER gets `logits` (`hidden` without a head), and of every
quantized layer NAME: `codes/NAME` [O, I], `scales/NAME` and `zero_points/NAME` [O, N], `weights/NAME` in the folder's
dtype, with which the model then computes in fp32. FP4, which compressed-tensors would decompress to bfloat16, goes
through its `dequantize` in fp32. Activations stay in full precision: how a live range is taken is the engine's affair.

The model is what plain `from_pretrained` gives. transformers 5.23 fails there on asymmetric folders (it expects zero
points that are not packed); of these, each layer goes through compressed-tensors' own decompression and then into the
plain model. Codes are unpacked by compressed-tensors' own functions.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
OWN = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


def read_codes(own: dict, args: Any) -> tuple:
    """(codes [O, I], scale [O, N], zero point or None), as kdqat counts them: asymmetric grids from 0."""
    scale, shift = own["weight_scale"], 0 if args.symmetric else 2 ** (args.num_bits - 1)
    if args.type == "float":
        rows, half = own["weight_packed"].shape
        values = unpack_fp4_from_uint8(own["weight_packed"], rows, 2 * half, dtype=torch.float32)
        codes = torch.bucketize(values.abs(), FP4_VALUES) + 8 * torch.signbit(values).long()
        if scale.dtype == torch.uint8:
            return codes, torch.ldexp(torch.ones(scale.shape), scale.int() - 127), None
        return codes, scale.float() / own["weight_global_scale"], None
    if "weight" in own:
        codes = own["weight"]
    else:
        codes = unpack_from_int32(own["weight_packed"], args.num_bits, torch.Size(own["weight_shape"].tolist()))
    if args.symmetric:
        return codes, scale, None
    shape = torch.Size((len(codes), scale.shape[1]))
    zero_point = unpack_from_int32(own["weight_zero_point"], args.num_bits, shape, packed_dim=0)
    return codes.int() + shift, scale, zero_point.int() + shift


def plain_load(folder: str, kind: Any, layers: dict) -> tuple:
    """The model of `from_pretrained`, decompressed as its first call would, and its dequantized weights."""
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    model.hf_quantizer.compressor.decompress_model(model)
    weights = {}
    for name, (own, scheme, _) in layers.items():
        module = model.get_submodule(name)
        module.quantization_enabled = False  # of the activations
        weights[name] = module.weight.detach()
        if scheme.weights.type == "float":
            weights[name] = dequantize_fp4(own, scheme.weights)
    return model, weights


def dequantize_fp4(own: dict, args: Any) -> torch.Tensor:
    rows, half = own["weight_packed"].shape
    values, scale = (
        unpack_fp4_from_uint8(own["weight_packed"], rows, 2 * half, dtype=torch.float32),
        own["weight_scale"],
    )
    scale = torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()
    return dequantize(values, scale, args=args, dtype=torch.float32, global_scale=own.get("weight_global_scale"))


def load_by_layer(kind: Any, config: Any, tensors: dict, layers: dict) -> tuple:
    """The plain model, each quantized layer through its compressor's own `decompress`."""
    del config.quantization_config
    weights: dict = {}
    state = dict(tensors)
    for name, (own, scheme, form) in layers.items():
        own = {key: value.float() if key == "weight_scale" else value for key, value in own.items()}
        weights[name] = BaseCompressor.get_value_from_registry(form).decompress(own, scheme)["weight"]
        state = {key: value for key, value in state.items() if key.rpartition(".")[0] != name or key.endswith(".bias")}
        state[f"{name}.weight"] = weights[name]
    model = kind(config).float().eval()
    missing, unexpected = model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    model.tie_weights()
    assert set(missing) <= set(model.all_tied_weights_keys) and not unexpected, (missing, unexpected)
    return model, weights


@torch.no_grad()
def main(folder: str, request: str, answer: str) -> None:
    tensors: dict = {}
    layers: dict = {}
    found: dict = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    config = transformers.AutoConfig.from_pretrained(folder)
    stored = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(stored).config_groups.values()
    by_name = {target: group for group in groups for target in group.targets}
    for name in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        scheme = by_name.get(name) or by_name["Linear"]
        own = {key: tensors[f"{name}.{key}"] for key in OWN if f"{name}.{key}" in tensors}
        layers[name] = (own, scheme, scheme.format or stored["format"])
        codes, scale, zero_point = read_codes(own, scheme.weights)
        found[f"codes/{name}"], found[f"scales/{name}"] = codes.int(), scale.float()
        if zero_point is not None:
            found[f"zero_points/{name}"] = zero_point
    assert layers, "no quantized layer was read"
    kind, dtype = getattr(transformers, config.architectures[0]), config.dtype
    if all(group.weights.symmetric for group in groups):
        model, weights = plain_load(folder, kind, layers)
    else:
        model, weights = load_by_layer(kind, config, tensors, layers)
    for name, weight in weights.items():
        found[f"weights/{name}"] = weight.to(dtype)
        model.get_submodule(name).weight.data = weight.to(dtype).float()
    output = model(**load_file(request))
    found["logits" if "logits" in output else "hidden"] = output[0].float()
    save_file({key: value.clone().contiguous() for key, value in found.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
