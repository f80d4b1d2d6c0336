"""ONNX of an encoder: the student's codes and scales, each behind a DequantizeLinear node that onnxruntime computes.

The plain model is exported by torch, then every planned weight (an initializer under its own name) is replaced by
codes, scales and zero points and the node that multiplies them: int4 and uint4 two to a byte, others a byte each. What
runs is the student's float32 arithmetic; a backend that knows the pattern multiplies the codes instead.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdqat.exporters.base import Exporter
from kdqat.exporters.hf_files import save_hf_files
from kdqat.quant import FakeQuantLinear, strip_fake_quant
from kdqat.spec import QuantSpec
from kdqat.student import Student

_OPSET = 21  # the first with 4-bit integers and blocks of inputs
_PREFIX = "plain."  # of the model inside what is exported


class ONNX(Exporter):
    """model.onnx for onnxruntime, of encoders.

    Its inputs are `input_ids` and `attention_mask` [B, T], its output `hidden` [B, T, H], or `logits` [B, T, V] where
    the model has a head; a pooler's output is `pooled`.
    """

    name: ClassVar[str] = "onnx"
    reader: ClassVar[str] = "onnx_reader.py"
    library_name: ClassVar[str] = "onnx"

    def writer_missing(self) -> str | None:
        return _missing("onnx", "onnxscript")

    def reader_missing(self) -> str | None:
        return _missing("onnx", "onnxruntime")

    def refuses(self, student: Student) -> str | None:
        if student.split.family.causal:
            first = next(iter(student.layers))
            why = "a decoder in ONNX would recompute its cache at every token"
            return f"{first}: {why}: export GGUF or compressed-tensors"
        for name, layer in student.layers.items():
            if layer.weight_fake_quantizer is None:
                continue
            spec = layer.weight_fake_quantizer.spec
            if not isinstance(layer, FakeQuantLinear) or not _holds(spec):
                return (
                    f"{name}: DequantizeLinear holds int4 and int8 of linear layers, by channel or group, with an "
                    f"integer zero point or none, and this is {spec.format}, {spec.granularity}, zero_point "
                    f"{spec.zero_point}; train under W4A16_G32 or W8A16, or export DequantizedHF"
                )
            if layer.adapter is not None and layer.adapter.placement == "outside":
                return f"{name}: its adapter is not part of its codes: place it inside, or export DequantizedHF"
        return None

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        self.require_writer()
        import onnx

        self.say_what_is_left(student.plan)
        graph_of_floats = plain_onnx(student)
        for name, layer in student.layers.items():
            if layer.weight_fake_quantizer is not None:
                put_codes(graph_of_floats.graph, name, layer)
        onnx.checker.check_model(graph_of_floats)
        onnx.save(graph_of_floats, out_dir / "model.onnx")
        save_hf_files(student, out_dir)

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        lines = [
            "# pip install onnxruntime",
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            "",
            f'session = onnxruntime.InferenceSession("{folder}/model.onnx")',
            f'tokens = AutoTokenizer.from_pretrained("{folder}")(["a sentence"], return_tensors="np")',
            "names = {value.name for value in session.get_inputs()}",
            "print(session.run(None, {key: value for key, value in tokens.items() if key in names})[0])",
        ]
        return {"onnxruntime": "\n".join(lines)}


def _missing(*packages: str) -> str | None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f'{package}; pip install "kdqat[onnx]"'
    return None


class _Plain(nn.Module):
    """The plain model as a function of two tensors; gives the outputs of these names."""

    def __init__(self, model: nn.Module, outputs: list[str]) -> None:
        super().__init__()
        self.plain, self.outputs = model, outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        answer = self.plain(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(answer[name] for name in self.outputs)


def plain_onnx(student: Student) -> Any:
    """The student with dequantized weights as an `onnx.ModelProto`, float32, of any batch and length."""
    model = strip_fake_quant(copy.deepcopy(student.model)).cpu().float().eval()
    names = {"logits": "logits"} if student.split.has_head else {"last_hidden_state": "hidden"}
    if getattr(model, "pooler", None) is not None:
        names["pooler_output"] = "pooled"
    ids = torch.ones(2, 8, dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1, max=4096)
    sizes = {0: batch, 1: torch.export.Dim("tokens", min=2, max=model.config.max_position_embeddings)}
    program = torch.onnx.export(
        _Plain(model, list(names)).eval(),
        (ids, torch.ones_like(ids)),
        dynamo=True,
        optimize=False,  # it would fold transposed copies of weights
        opset_version=_OPSET,
        input_names=["input_ids", "attention_mask"],
        output_names=list(names.values()),
        dynamic_shapes=(sizes, sizes),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def put_codes(graph: Any, name: str, layer: Any) -> None:
    """Put codes, scales and a DequantizeLinear node in the place of the layer's weight.

    Raises:
        ValueError: if the graph has no such weight.
    """
    from onnx import helper, numpy_helper

    weight = f"{_PREFIX}{name}.weight"
    found = [tensor for tensor in graph.initializer if tensor.name == weight]
    matrix, quantizer = layer.latent_matrix(), layer.weight_fake_quantizer
    if not found or not np.array_equal(
        numpy_helper.to_array(found[0]), layer.fake_quantized_weight().float().cpu().numpy()
    ):
        raise ValueError(f"{name}: torch's ONNX export has no weight of this name: leave the layer out of the plan")
    graph.initializer.remove(found[0])
    stored, spec = quantizer.stored_qparams(matrix), quantizer.spec
    kind = f"{'' if spec.symmetric else 'U'}INT{4 if spec.bits <= 4 else 8}"
    by_channel = spec.granularity == "channel"
    scale, zero_point = (part.squeeze(2).cpu() for part in stored)
    if by_channel:
        scale, zero_point = scale.squeeze(1), zero_point.squeeze(1)
    parts = [_integers(f"{weight}.codes", kind, quantizer.codes(matrix).cpu())]
    parts.append(numpy_helper.from_array(scale.numpy(), f"{weight}.scale"))
    if not spec.symmetric:
        parts.append(_integers(f"{weight}.zero_point", kind, zero_point))
    graph.initializer.extend(parts)
    where: dict[str, Any] = (
        {"axis": 0} if by_channel else {"axis": 1, "block_size": int(matrix.shape[1] // scale.shape[1])}
    )
    node = helper.make_node("DequantizeLinear", [part.name for part in parts], [weight], name=weight, **where)
    graph.node.insert(0, node)


def _integers(name: str, kind: str, numbers: Tensor) -> Any:
    """A tensor of INT4, UINT4 (two to a byte, the first low), INT8 or UINT8."""
    from onnx import TensorProto, helper

    flat = numbers.flatten().to(torch.int16).numpy()
    if kind.endswith("4"):
        flat = np.pad(flat, (0, len(flat) % 2)) & 0x0F
        flat = flat[::2] | flat[1::2] << 4
    raw = flat.astype(np.int8 if kind == "INT8" else np.uint8).tobytes()
    return helper.make_tensor(name, getattr(TensorProto, kind), list(numbers.shape), raw, raw=True)


def _holds(spec: QuantSpec) -> bool:
    integer = spec.number.kind == "integer" and spec.format.startswith("int")
    shared = spec.granularity in ("group", "channel") and spec.hadamard is None
    return integer and spec.zero_point in ("none", "integer") and shared
