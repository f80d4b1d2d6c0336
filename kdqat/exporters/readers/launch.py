"""Runs a reader and notes what it had loaded: `python -I launch.py READER FOLDER REQUEST ANSWER`.

Writes ANSWER.json: `modules`, the top-level modules that were imported at the end, and `versions` of those that read
formats. Here, so that no reader can forget it. Like every file in this folder it imports no kdqat.
"""

import json
import platform
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "compressed-tensors", "gguf", "torchao"),
    *("onnx", "onnxruntime", "xllamacpp", "gptqmodel", "autoawq"),
)


def main() -> None:
    reader, answer = sys.argv[1], sys.argv[4]
    sys.argv = sys.argv[1:]
    runpy.run_path(reader, run_name="__main__")
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        if name.replace("-", "_") in modules:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "unknown"
    with open(f"{answer}.json", "w", encoding="utf-8") as file:
        json.dump({"modules": modules, "versions": versions}, file)


main()
