"""Reads an ONNX file with onnx and onnxruntime: `python -I onnx_reader.py FOLDER REQUEST ANSWER`, safetensors files.

REQUEST holds `input_ids` [B, T] and may hold `attention_mask`. ANSWER gets the model's output, `hidden` [B, T, H] or
`logits` [B, T, V], and of every DequantizeLinear node `codes/NAME`, `scales/NAME`, `zero_points/NAME` as they lie in
the file and `weights/NAME` as onnxruntime computes them; every other parameter as `weights/NAME`.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file


def main(folder: str, request: str, answer: str) -> None:
    model = onnx.load(Path(folder) / "model.onnx")
    (output,) = {value.name for value in model.graph.output} & {"hidden", "logits"}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensors, weights, of_codes = {}, [], set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        name = node.output[0].removeprefix("plain.").removesuffix(".weight")
        kinds = {"codes": np.int16, "scales": np.float32, "zero_points": np.int16}
        for (kind, dtype), part in zip(kinds.items(), node.input, strict=False):
            tensors[f"{kind}/{name}"] = stored[part].astype(dtype)
        weights.append((f"weights/{name}", node.output[0]))
        of_codes |= set(node.input)
    for _, value in weights:
        model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = load_file(request)
    inputs.setdefault("attention_mask", np.ones_like(inputs["input_ids"]))
    first, *others = session.run([output, *(value for _, value in weights)], inputs)
    tensors[output] = first
    for name, value in stored.items():  # integers are positions, which torch puts in
        if name.startswith("plain.") and name not in of_codes and value.dtype.kind == "f":
            tensors[f"weights/{name.removeprefix('plain.').removesuffix('.weight')}"] = value
    tensors |= {key: value for (key, _), value in zip(weights, others, strict=True)}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
