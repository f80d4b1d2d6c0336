"""Reads a GGUF file with llama.cpp itself, through the prebuilt wheel xllamacpp; knows nothing of kdqat.

    python -I llama_cpp.py FOLDER REQUEST.safetensors ANSWER.safetensors

REQUEST holds input_ids [B, T], and may hold `text` (UTF-8 bytes, uint8). ANSWER gets `nll` [B, T - 1] float32, of every
token but the first minus the logarithm of its probability given those before it; `text_ids`, what llama.cpp's own
tokenizer makes of the text; `greedy`, the UTF-8 bytes of 24 tokens that llama.cpp goes on with after the first half of
row 0. llama.cpp gives no logits: its server is asked for one token at a time, the prompt so far stays in its cache.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

CANNOT = 3  # exit code: no fault of the file's
LIKELIEST = (512, 8192)  # log-probabilities asked for at first, and then; of a still rarer token all of them are


class LlamaCpp:
    """llama.cpp's server in this process, asked over HTTP."""

    def __init__(self, path: Path, num_positions: int) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = parameters.n_batch = num_positions
        parameters.n_parallel, parameters.n_gpu_layers, parameters.port = 1, 0, 0
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or -1  # they spin while they wait: no more than are free
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.warmup, parameters.verbosity = False, -1
        self.server = xllamacpp.Server(parameters)

    def ask(self, path: str, **question: Any) -> dict[str, Any]:
        body = json.dumps(question).encode()
        request = urllib.request.Request(self.server.listening_address + path, body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def nll(self, prompt: list[int], target: int, vocab_size: int) -> float:
        for count in (*LIKELIEST, vocab_size):
            asked = {"n_predict": 1, "n_probs": count, "temperature": 0.0, "cache_prompt": True}
            answer = self.ask("/completion", prompt=prompt, **asked)
            found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
            if target in found:
                return -float(found[target])
        raise SystemExit(f"llama.cpp gave no probability to token {target}")


def main(folder: str, request: str, answer: str) -> None:
    (path,) = Path(folder).glob("*.gguf")
    asked = load_file(request)
    rows = asked["input_ids"].tolist()
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    fields = GGUFReader(path).fields
    merges = fields.get("tokenizer.ggml.merges")
    if fields["tokenizer.ggml.model"].contents() == "gpt2" and (merges is None or not len(merges.data)):
        print("its tokenizer has no merges, without which llama.cpp loads no byte-level BPE", file=sys.stderr)
        raise SystemExit(CANNOT)
    model = LlamaCpp(path, num_positions=len(rows[0]) + 32)
    found = {}
    nll = [[model.nll(row[:i], row[i], vocab_size) for i in range(1, len(row))] for row in rows]
    found["nll"] = torch.tensor(nll, dtype=torch.float32)
    if "text" in asked:
        text = bytes(asked["text"].tolist()).decode()
        tokens = model.ask("/tokenize", content=text, add_special=True)["tokens"]
        found["text_ids"] = torch.tensor(tokens, dtype=torch.int64)
    go_on = model.ask("/completion", prompt=rows[0][: len(rows[0]) // 2], n_predict=24, temperature=0.0)
    found["greedy"] = torch.tensor(list(go_on["content"].encode()), dtype=torch.uint8)
    save_file(found, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
