"""One GGUF file for llama.cpp, Ollama and LM Studio: the student's own codes and scales in llama.cpp's blocks.

Every planned weight keeps the codes and scales it was trained with; nothing is quantized anew. Rows of q and k are put
into llama.cpp's order as bytes (`models/gguf_file.py`). Norms and biases stay float32. What the plan leaves alone is
rounded to `embeddings` and `ignored`; with float32 for both the file is the student to the last bit. llama.cpp itself
rounds activations to 8 bits while it multiplies, which no file can forbid.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from kdqat.exporters.base import Exporter
from kdqat.exporters.gguf_metadata import add_metadata, refuses_config, rope_factors
from kdqat.exporters.gguf_tokenizer import add_tokenizer, copy_tokenizer, refuses_tokenizer
from kdqat.exporters.hf_files import save_hf_files
from kdqat.models.gguf_file import FAMILIES, gguf_path, num_rope_heads, tensor_names, to_neighbours
from kdqat.quant import FakeQuantizer, MinMax
from kdqat.quant.layouts.gguf import LAYOUTS, pack_gguf
from kdqat.quant.layouts.packing import Blocks
from kdqat.spec import QuantSpec, preset
from kdqat.student import Student, plain_state

# what decides the bytes; which range became the scale, and that a code is never used, do not
_STORED = ("format", "granularity", "group_size", "symmetric", "zero_point", "scale_dtype", "hadamard", "levels")

_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj")}  # model type -> whose biases llama.cpp adds; others have none

GGUFType = Literal["q4_0", "q4_1", "q8_0", "q4_k", "mxfp4", "mixed"]
FloatType = Literal["f16", "f32"]


class GGUF(Exporter):
    """A .gguf file with metadata and tokenizer.

    Args:
        type: the block type of every planned layer; "mixed": each layer's own.
        embeddings: of embeddings and output where the plan leaves them alone; "q8_0" rounds them to 8 bits.
        ignored: of layers that the plan leaves alone.
    """

    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"gguf:{type}": {"type": type} for type in get_args(GGUFType)}
    reader: ClassVar[str] = "gguf_file.py"
    engine: ClassVar[str] = "llama_cpp.py"
    library_name: ClassVar[str] = "gguf"

    def __init__(
        self,
        *,
        type: GGUFType = "q4_0",
        embeddings: FloatType | Literal["q8_0"] = "f16",
        ignored: FloatType = "f16",
    ) -> None:
        _one_of("type", type, get_args(GGUFType))
        _one_of("embeddings", embeddings, ("f16", "f32", "q8_0"))
        _one_of("ignored", ignored, get_args(FloatType))
        self.type, self.embeddings, self.ignored = type, embeddings, ignored

    @property
    def name(self) -> str:
        return f"gguf_{self.type}"

    @property
    def file_name(self) -> str:
        """The file in its folder."""
        return f"model-{self.type.upper()}.gguf"

    @property
    def plain_dtype(self) -> str:
        """In which everything besides the planned weights is stored, at the worst; 8 bits round as bfloat16 does."""
        if self.embeddings == "q8_0":
            return "bfloat16"
        return "float32" if self.embeddings == self.ignored == "f32" else "float16"

    def engine_missing(self) -> str | None:
        if importlib.util.find_spec("xllamacpp") is None:
            return 'xllamacpp, a built llama.cpp; pip install "kdqat[llamacpp]"'
        return None

    def refuses(self, student: Student) -> str | None:
        config = student.model.config
        reason = refuses_config(config) or self._refuses_layers(student)
        if reason is None and self.embeddings == "q8_0" and config.hidden_size % LAYOUTS["q8_0"].block_size:
            reason = f"embeddings: q8_0 holds blocks of 32, which do not divide width {config.hidden_size}: use f16"
        if reason is None and gguf_path(student.source) is None:
            reason = refuses_tokenizer(student.tokenizer)
        return reason

    def _refuses_layers(self, student: Student) -> str | None:
        known = tensor_names(student.model.config)
        biased = _BIASED.get(student.model.config.model_type, ())
        for key in plain_state(student):
            module, _, parameter = key.rpartition(".")
            if module not in known or (parameter == "bias" and module.rpartition(".")[2] not in biased):
                return f"{key} has no place in this architecture's GGUF; export DequantizedHF"
        for name, layer in student.layers.items():
            if layer.adapter is not None and layer.adapter.placement == "outside":
                return f"{name}: its adapter is not part of its codes: merge it (placement: inside), or DequantizedHF"
            if layer.weight_fake_quantizer is None:
                continue
            spec, width = layer.weight_fake_quantizer.spec, layer.input_width
            kind = block_type(spec)
            if kind is None:
                return f"{name}: {_words(spec)} is none of GGUF's blocks; {_nearest(spec)}"
            if self.type not in (kind, "mixed"):
                return f"{name}: its scheme is that of {kind}, not {self.type}; use gguf:{kind}, or gguf:mixed"
            if width % LAYOUTS[kind].block_size:
                return f"{name}: {kind} has blocks of {LAYOUTS[kind].block_size}, which do not divide width {width}"
        return None

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        from gguf import GGMLQuantizationType, GGUFWriter

        self.say_what_is_left(student.plan)
        config = student.model.config
        writer = GGUFWriter(out_dir / self.file_name, FAMILIES[config.model_type].architecture)
        kinds = Counter(block_type(scheme.weight) for scheme in student.plan.values() if scheme.weight is not None)
        file_type = str(kinds.most_common(1)[0][0]) if kinds else "f16"
        add_metadata(writer, config, name=Path(student.source.path).name, file_type=file_type)
        source = gguf_path(student.source)
        if source is not None:
            copy_tokenizer(writer, source)
        else:
            add_tokenizer(writer, student.tokenizer, config.vocab_size)
        for name, (kind, rows) in self._tensors(student).items():
            writer.add_tensor(name, rows.contiguous().cpu().numpy(), raw_dtype=GGMLQuantizationType[kind.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        save_hf_files(student, out_dir)

    def stored(self, key: str, value: Tensor) -> Tensor:
        kind, rows = self._plain(key, key.rpartition(".")[0], value)
        if kind != "q8_0":
            return rows
        quantizer = _eight_bits(value)
        return quantizer.values(quantizer.codes(value), quantizer.stored_qparams(value)).reshape(value.shape)

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        path = f"{folder}/{self.file_name}"
        return {
            "llama.cpp": f"llama-cli -m {path}",
            "llama.cpp server": f"llama-server -m {path} --port 8080",
            "Ollama": f"echo 'FROM {path}' > Modelfile && ollama create student -f Modelfile && ollama run student",
        }

    def _tensors(self, student: Student) -> dict[str, tuple[str, Tensor]]:
        """GGUF's name -> (type, rows as they are written)."""
        config, names, layers = student.model.config, tensor_names(student.model.config), student.layers
        tensors: dict[str, tuple[str, Tensor]] = {}
        for key, value in plain_state(student).items():
            module, _, parameter = key.rpartition(".")
            if module == "lm_head" and config.tie_word_embeddings:
                continue  # llama.cpp takes the embedding where there is no output
            layer = layers.get(module) if parameter == "weight" else None
            if layer is not None and layer.weight_fake_quantizer is not None:
                kind, rows = packed(layer.weight_fake_quantizer, layer.latent_matrix())
            else:
                matrix = layer.dequantized_weight() if layer is not None else value
                kind, rows = self._plain(key, module, matrix)
            heads = num_rope_heads(module, config)
            tensors[f"{names[module]}.{parameter}"] = kind, rows if heads is None else to_neighbours(rows, heads)
        factors = rope_factors(config)
        if factors is not None:
            tensors["rope_freqs.weight"] = "f32", factors
        return tensors

    def _plain(self, key: str, module: str, value: Tensor) -> tuple[str, Tensor]:
        """A tensor that the plan leaves alone."""
        kind = self.embeddings if module in ("model.embed_tokens", "lm_head") else self.ignored
        if value.dim() == 1 or kind == "f32":
            return "f32", value.float()
        if kind == "q8_0":
            return packed(_eight_bits(value), value)
        if value.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"{key} has numbers that float16 does not hold: export with embeddings and ignored f32")
        return "f16", value.half()


def _eight_bits(value: Tensor) -> FakeQuantizer:
    """What rounds an embedding to Q8_0."""
    spec = preset(LAYOUTS["q8_0"].preset).weight
    assert spec is not None
    return MinMax(spec, value.shape).to(value.device)


def block_type(spec: QuantSpec | None) -> str | None:
    """The block type that holds every weight of `spec` bit for bit; None if there is none."""
    for kind, layout in LAYOUTS.items():
        wanted = preset(layout.preset).weight
        assert wanted is not None
        if spec is not None and all(getattr(spec, key) == getattr(wanted, key) for key in _STORED):
            return kind
    return None


def packed(quantizer: FakeQuantizer, matrix: Tensor) -> tuple[str, Tensor]:
    """(block type, bytes [O, bytes of a row]) of what `quantizer` stores of `matrix` [O, I]."""
    kind, stored = block_type(quantizer.spec), quantizer.stored_qparams(matrix)
    assert kind is not None
    minimum = stored.zero_point.squeeze(2) if quantizer.spec.zero_point == "minimum" else None
    second = {name: value.squeeze(2) for name, value in quantizer.second_level(matrix).items()}
    return kind, pack_gguf(kind, Blocks(quantizer.codes(matrix), stored.scale.squeeze(2), minimum, second))


def _words(spec: QuantSpec) -> str:
    group = f" of {spec.group_size}" if spec.group_size else ""
    symmetry = "symmetric" if spec.symmetric else f"asymmetric ({spec.zero_point})"
    return f"{spec.format}, {symmetry}, {spec.granularity}{group}, scales in {spec.scale_dtype}"


def _nearest(spec: QuantSpec) -> str:
    near = {4: "GGUF_Q4_0" if spec.symmetric else "GGUF_Q4_1", 8: "GGUF_Q8_0"}.get(int(spec.bits))
    near = "MXFP4_A16" if spec.format == "e2m1" else near
    return f"train under {near}, or export DequantizedHF" if near else "export DequantizedHF"


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"GGUF: {key} {value!r} is unknown: use {', '.join(allowed)}")
