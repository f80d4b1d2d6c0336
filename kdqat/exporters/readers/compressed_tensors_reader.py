"""Reads a compressed-tensors folder with transformers and compressed-tensors, as its users do. Knows no kdqat.

    python -I compressed_tensors_reader.py FOLDER REQUEST.safetensors ANSWER.safetensors

REQUEST holds input_ids [B, T] (and attention_mask); ANSWER gets `logits` (`hidden` without a head), and of every
quantized layer NAME: `codes/NAME` [O, I], `scales/NAME` and `zero_points/NAME` [O, N], `weights/NAME` in the folder's
dtype, with which the model then computes in fp32; every other tensor is answered as `weights/NAME`. FP4, which
compressed-tensors would decompress to bfloat16, goes through its `dequantize` in fp32. Inputs of layers stay in full
precision: how a live range is taken is the engine's affair; `input_bits/NAME`, and static `input_scales/NAME`,
`input_zero_points/NAME` or NVFP4's `input_global_scales/NAME` are answered as they lie in the folder. A KV cache
answers with its scales, `scales/ATTENTION.key` and `.value`; the model quantizes it in a float32 folder, while in 16
bits keys on the edge of two FP8 codes fall to either side, and logits would say nothing.

The model is what plain `from_pretrained` gives. transformers 5.23 fails there on asymmetric folders (it expects zero
points that are not packed); these are loaded as their users load them, with CompressedTensorsConfig(dequantize=True),
which computes in the dtype of the scales: there the weights answered are compressed-tensors' own in fp32, and what
transformers has must be these in that dtype. Codes are unpacked by compressed-tensors' own functions.
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
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
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


def read_inputs(name: str, tensors: dict, args: Any) -> dict:
    """What the config says of the layer's inputs, and the ranges that engines take by it, asymmetric ones from 0."""
    if args is None:
        return {}
    found = {f"input_bits/{name}": torch.tensor([args.num_bits])}
    if args.strategy == "tensor_group":
        found[f"input_global_scales/{name}"] = tensors[f"{name}.input_global_scale"]
    elif args.dynamic is False:
        found[f"input_scales/{name}"] = tensors[f"{name}.input_scale"]
        if not args.symmetric:
            found[f"input_zero_points/{name}"] = tensors[f"{name}.input_zero_point"].int() + 2 ** (args.num_bits - 1)
    return found


def load(folder: str, kind: Any, layers: dict, cache_scheme: dict | None) -> tuple:
    """The model of `from_pretrained`, and its dequantized weights by layer."""
    symmetric = all(scheme.weights.symmetric for _, scheme, _ in layers.values())
    how = {} if symmetric else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    cache = () if symmetric else tuple(key for key in info["unexpected_keys"] if key.endswith((".k_scale", ".v_scale")))
    assert not info["missing_keys"] and info["unexpected_keys"] <= set(cache), f"transformers says: {info}"
    model.eval()
    if symmetric:
        model.hf_quantizer.compressor.decompress_model(model)  # as its first call would
    elif cache_scheme:  # which a dequantized load passes over
        apply_quantization_config(model, QuantizationConfig(config_groups={}, kv_cache_scheme=cache_scheme))
    weights = {}
    for name, (own, scheme, form) in layers.items():
        module = model.get_submodule(name)
        module.quantization_enabled = False  # of its input
        weights[name] = module.weight.detach()
        if scheme.weights.type == "float":
            weights[name] = dequantize_fp4(own, scheme.weights)
        elif not symmetric:
            weights[name] = decompress(own, scheme, form)
            in_dtype = weights[name].to(own["weight_scale"].dtype).float()
            assert torch.equal(in_dtype, module.weight), f"{name}: transformers dequantizes it to other weights"
    return model, weights


def plain_tensors(model: Any, layers: dict) -> dict:
    """All tensors but those of quantized weights and of the cache; what is tied once."""
    found, seen = {}, set()
    for key, value in model.state_dict().items():
        module, _, last = key.rpartition(".")
        of_codes = module in layers and last != "bias"
        if not of_codes and not hasattr(model.get_submodule(module), "kv_cache") and value.data_ptr() not in seen:
            found[f"weights/{key.removesuffix('.weight')}"] = value
            seen.add(value.data_ptr())
    return found


def decompress(own: dict, scheme: Any, form: str) -> torch.Tensor:
    own = {key: value.float() if key == "weight_scale" else value for key, value in own.items()}
    return BaseCompressor.get_value_from_registry(form).decompress(own, scheme)["weight"]


def cache_scales(model: Any, tensors: dict, *, on: bool) -> dict:
    """Scales of the KV cache, put into the model where loading did not; {} where it has none."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "kv_cache"):
            module.quantization_enabled = on
            for part, scale in (("key", "k_scale"), ("value", "v_scale")):
                getattr(module, scale).data.copy_(tensors[f"{name}.{scale}"])
                found[f"scales/{name}.{part}"] = getattr(module, scale).detach()
    return found


def dequantize_fp4(own: dict, args: Any) -> torch.Tensor:
    rows, half = own["weight_packed"].shape
    values, scale = (
        unpack_fp4_from_uint8(own["weight_packed"], rows, 2 * half, dtype=torch.float32),
        own["weight_scale"],
    )
    scale = torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()
    return dequantize(values, scale, args=args, dtype=torch.float32, global_scale=own.get("weight_global_scale"))


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
        found |= read_inputs(name, tensors, scheme.input_activations)
    assert layers, "no quantized layer was read"
    transformers.AutoTokenizer.from_pretrained(folder)  # whoever serves the folder needs it as well
    kind, dtype = getattr(transformers, config.architectures[0]), config.dtype
    model, weights = load(folder, kind, layers, stored["kv_cache_scheme"])
    found |= plain_tensors(model, layers)
    found |= cache_scales(model, tensors, on=dtype == torch.float32)
    for name, weight in weights.items():
        found[f"weights/{name}"] = weight.to(dtype)
        model.get_submodule(name).weight.data = weight.to(dtype).float()
    output = model(**load_file(request))
    found["logits" if "logits" in output else "hidden"] = output[0].float()
    save_file({key: value.clone().contiguous() for key, value in found.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
