"""Reads torchao's tensors out of safetensors, nothing unpickled: `python -I torchao_reader.py FOLDER REQUEST ANSWER`.

REQUEST holds `input_ids` [B, T]. ANSWER gets `logits` [B, T, V] float32 (without a head `hidden`, the last hidden
states), and of every quantized layer `codes/NAME` (asymmetric ones from 0), `scales/NAME`, `zero_points/NAME` and
`weights/NAME` as torchao dequantizes them; every other tensor as `weights/NAME`, what is tied once.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import IntxUnpackedToInt8Tensor


def load(folder: str) -> Any:
    """The model with torchao's tensors for weights, as a user loads it."""
    file = Path(folder) / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    state, left = unflatten_tensor_state_dict(load_file(file), metadata)
    if left:
        raise SystemExit(f"torchao does not know what {sorted(left)[:3]} belong to")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or not set(missing) <= set(model.all_tied_weights_keys):
        raise SystemExit(f"the model misses {missing} and has no {unexpected}")
    transformers.AutoTokenizer.from_pretrained(folder)  # whoever serves the folder needs it as well
    model.tie_weights()
    return model.eval()


def main(folder: str, request: str, answer: str) -> None:
    model = load(folder)
    plan = json.loads((Path(folder) / "quant_plan.json").read_text())
    tensors = {}
    seen = set()
    for key, value in model.state_dict().items():
        if not isinstance(value, IntxUnpackedToInt8Tensor) and value.data_ptr() not in seen:
            tensors[f"weights/{key.removesuffix('.weight')}"] = value
            seen.add(value.data_ptr())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            continue
        symmetric = plan["schemes"][plan["layers"][name]]["weight"]["symmetric"]
        shift = 0 if symmetric else 2 ** (int(str(weight.target_dtype).removeprefix("torch.int")) - 1)
        tensors[f"codes/{name}"] = weight.qdata.to(torch.int16) + shift
        tensors[f"scales/{name}"] = weight.scale
        tensors[f"zero_points/{name}"] = weight.zero_point.to(torch.int16) + shift
        tensors[f"weights/{name}"] = weight.dequantize()
        weight.activation_quantization = None  # logits are of the weights: whoever trains rounds a live range his way
    with torch.no_grad():
        output = model(**load_file(request), output_hidden_states=True)
    has_logits = "logits" in output
    tensors["logits" if has_logits else "hidden"] = output.logits if has_logits else output.hidden_states[-1]
    save_file({key: value.contiguous() for key, value in tensors.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
