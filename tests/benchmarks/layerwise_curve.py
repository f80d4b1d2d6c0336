"""The curve of Layer-Wise Quantization (https://arxiv.org/abs/2406.17415): quality against the share of low-bit blocks.

    python tests/benchmarks/layerwise_curve.py MODEL DATA_DIR OUT_DIR WINDOWS STEP [BACKEND ...]
    python tests/benchmarks/layerwise_plot.py OUT_DIR/curve.jsonl OUT_DIR/curve.png

MODEL is a .gguf or a Hugging Face folder. Perplexity and KL to full precision on WINDOWS windows of 1024 tokens of
WikiText-2 (0: all), with 0, STEP, 2 STEP ... blocks moved from 4 to 2 bits and from 8 to 4, for orderings by LIM, ZD
and OutputKL (leave-one-in on C4, weights by RTN), these three reversed, 5 random ones, and `knapsack`: the layers'
schemes with the least sum of OutputKL costs at the bytes of the same number of blocks. BACKEND is a class of
kdqat.initializers (default: RTN, GPTQ, QuantoMax). Blocks are quantized once for each backend
and width and then swapped; GPTQ hears what the blocks before give at the same width. A run computes only from the first
changed block on. Rows append to OUT_DIR/curve.jsonl, scores lie in OUT_DIR/scores; what is there already is not
measured again. No BACKEND but `none`: scores alone.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdqat import initializers
from kdqat.allocate import BitAllocator, Knapsack
from kdqat.calibrate.block_call import hidden_of
from kdqat.calibrate.capture import capture
from kdqat.data import windows
from kdqat.importance import LIM, ZD, ImportanceScorer, OutputKL
from kdqat.importance.tail import Tail
from kdqat.metrics import perplexity, token_kl, token_nll
from kdqat.models import ModelSource, SplitModel, blocks_of, layer_refs
from kdqat.quant import Fixed
from kdqat.spec import LayerScheme, QuantPlan, QuantSpec, Scores, preset
from kdqat.student import prepare_student
from kdqat.types import Batch, LayerRef
from tests.benchmarks.smollm2_sweep import calibration

BACKENDS = ("RTN", "GPTQ", "QuantoMax")
PAIRS = ((4, 2), (8, 4))
CHUNK_TOKENS = 8192


def scheme(backend: str, bits: int, width: int) -> LayerScheme:
    """Quanto's own for QuantoMax (groups of 128, less by 32 until they fit), else asymmetric groups of 64."""
    if backend != "QuantoMax":
        return preset(f"W{bits}A16_ASYM_G64" if width % 64 == 0 else f"W{bits}A16_ASYM")
    if bits == 8:
        return preset("W8A16")
    size = next(size for size in (128, 96, 64, 32) if width % size == 0)
    group: dict[str, Any] = {"granularity": "group", "group_size": size}
    return LayerScheme(
        weight=QuantSpec(format=f"int{bits}", symmetric=False, zero_point="minimum", scale_dtype="float16", **group)
    )


class Planned(BitAllocator):
    """One width of a backend for every layer inside the blocks."""

    def __init__(self, backend: str, bits: int) -> None:
        self.backend, self.bits = backend, bits

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        inside = [layer for layer in layers if layer.block is not None]
        plan = {layer.name: scheme(self.backend, self.bits, layer.shape[1]) for layer in inside}
        others = [layer.name for layer in layers if layer.block is None and layer.role != "embedding"]
        return QuantPlan(plan, tuple(others))


class Curve:
    """A model whose layers' weights are exchanged; it knows the hidden states in front of every block."""

    def __init__(self, split: SplitModel, ids: Tensor, batch_size: int) -> None:
        device = next(split.parameters()).device
        self.split, self.tail, self.blocks = split, Tail(split), blocks_of(split.model)
        self.labels = [rows[:, 1:].reshape(-1).to(device) for rows in ids.split(batch_size)]
        self.batches = [Batch(rows, rows) for rows in ids.split(batch_size)]
        self.reference = [self.tail.whole(batch) for batch in self.batches]
        captured = capture(split, self.batches, sequential=True, store=device, max_tokens=None)
        self.arguments = captured.arguments
        self.states: list[list[Tensor]] = [captured.hidden]  # of block 0, 1, ... len(blocks), by micro-batch
        self.number = {ref.name: ref.block for ref in layer_refs(split.model) if ref.block is not None}
        self.now: dict[str, int] = {}  # layer -> bits; nothing before the first run
        self.backend = ""

    @torch.no_grad()
    def measure(self, backend: str, weights: Mapping[int, Mapping[str, Tensor]], bits: Mapping[str, int]) -> dict:
        """Perplexity and mean KL with every layer's weight of the width that `bits` says."""
        changed = [name for name in bits if backend != self.backend or self.now.get(name) != bits[name]]
        first = min((self.number[name] for name in changed), default=len(self.blocks))
        for name in changed:
            self.split.model.get_submodule(name).weight.copy_(weights[bits[name]][name])
        self.now, self.backend = dict(bits), backend
        del self.states[first + 1 :]
        for index in range(first, len(self.blocks)):
            self.states.append([self._through(index, i) for i in range(len(self.batches))])
        return self._agreement()

    def _through(self, index: int, i: int) -> Tensor:
        call = self.arguments[i][index]
        return hidden_of(self.blocks[index](self.states[index][i], *call.args, **call.kwargs))

    def _agreement(self) -> dict[str, float]:
        kl, nll, num = 0.0, 0.0, 0
        for batch, before, states, labels in zip(
            self.batches, self.reference, self.states[-1], self.labels, strict=True
        ):
            hidden = self.tail.from_block(len(self.blocks), states, batch)
            rows = [h[:, :-1].flatten(0, 1).split(CHUNK_TOKENS) for h in (before, hidden)]
            for t_rows, s_rows, target in zip(*rows, labels.split(CHUNK_TOKENS), strict=True):
                ours = self.split.head(s_rows).float()
                kl += float(token_kl(self.split.head(t_rows).float(), ours).double().sum())
                nll += float(token_nll(ours, target).double().sum())
            num += len(labels)
        return {"perplexity": perplexity(nll, num), "kl": kl / num}


def quantized_weights(original: SplitModel, source: ModelSource, tokenizer: Any, backend: str, folder: Path) -> dict:
    """bits -> layer -> weight as the backend stores it."""
    found = {}
    for bits in sorted({bits for pair in PAIRS for bits in pair}):
        initializer = getattr(initializers, backend)()
        student = prepare_student(
            source,
            Planned(backend, bits),
            Fixed,
            initializer,
            calibration=calibration(folder),
            split=copy.deepcopy(original),
            tokenizer=tokenizer,
        )
        with torch.no_grad():
            found[bits] = {name: layer.fake_quantized_weight().clone() for name, layer in student.layers.items()}
    return found


def orderings(scores: Mapping[str, Scores], num_blocks: int) -> Iterator[tuple[str, list[str]]]:
    """(name, blocks in the order in which they lose bits)."""
    for name, one in scores.items():
        yield name, one.ranking()[::-1]
        yield f"{name} reversed", one.ranking()
    blocks = list(next(iter(scores.values())).importance)
    for seed in range(5):
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        yield f"random {seed}", [blocks[i] for i in order]


def main(path: str, data_dir: str, out_dir: str, num_windows: str, step: str, *names: str) -> None:
    folder, out = Path(data_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = ModelSource(path)
    original, tokenizer = SplitModel(source.load_model()).to(device), source.load_tokenizer()
    refs = [ref for ref in layer_refs(original.model) if ref.block is not None]
    file = out / "curve.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(row["backend"], row["bits"], row["order"], row["low_blocks"]) for row in rows}
    text = calibration(folder).batches(tokenizer)
    seq_len = min(1024, original.model.config.max_position_embeddings)
    ids = windows(str(folder / "wikitext2_raw_test.txt"), tokenizer, seq_len, protocol="wikitext2",
                  limit=int(num_windows) or None)  # fmt: skip
    curve = Curve(copy.deepcopy(original), ids, batch_size=8)

    def scored(label: str, scorer: ImportanceScorer) -> Scores:
        where = out / "scores" / f"{label}.json"
        if not where.is_file():
            started = time.monotonic()
            where.parent.mkdir(exist_ok=True)
            scorer.score(original, refs, text).save(where)
            print(f"{label}: scored in {time.monotonic() - started:.0f} s", flush=True)
        return Scores.load(where)

    blocks = {"LIM": scored("LIM", LIM()), "ZD": scored("ZD", ZD())}
    measured = {}
    width = math.gcd(*(ref.shape[1] for ref in refs))
    for pair in PAIRS:
        schemes = [scheme("RTN", bits, width) for bits in pair]  # of all costs, whatever the backend
        label = f"OutputKL-{pair[0]}-{pair[1]}"
        by_block = {**blocks, "OutputKL": scored(f"{label}-block", OutputKL(schemes, start="rtn"))}
        measured[pair] = schemes, by_block, scored(f"{label}-layer", OutputKL(schemes, start="rtn", unit="layer"))
    for backend in [name for name in names if name != "none"] if names else BACKENDS:
        started = time.monotonic()
        weights = quantized_weights(original, source, tokenizer, backend, folder)
        print(f"{backend}: quantized in {time.monotonic() - started:.0f} s", flush=True)
        for high, low in PAIRS:
            schemes, scores, layers = measured[high, low]
            members = scores["LIM"].members
            counts = range(0, len(members) + 1, int(step))
            plans = []
            for name, order in orderings(scores, len(members)):
                for k in counts:
                    lowered = {layer for block in order[:k] for layer in members[block]}
                    plans.append((name, k, {ref.name: low if ref.name in lowered else high for ref in refs}))
            ends = [average(refs, [s] * len(refs)) for s in schemes]
            for k in counts:
                budget = ends[0] - (ends[0] - ends[1]) * k / len(members)
                plan = Knapsack(layers, average_bits=budget).allocate(refs)
                plans.append(("knapsack", k, {name: int(s.weight.bits) for name, s in plan.items() if s.weight}))
            for name, k, bits in plans:
                if (backend, f"{high} to {low}", name, k) in done:
                    continue
                started = time.monotonic()
                numbers = curve.measure(backend, weights, bits)
                row = {
                    "backend": backend,
                    "bits": f"{high} to {low}",
                    "order": name,
                    "low_blocks": k,
                    "share": k / len(members),
                    "average_bits": average(refs, [scheme(backend, bits[r.name], r.shape[1]) for r in refs]),
                    **numbers,
                    "seconds": time.monotonic() - started,
                }
                with file.open("a") as handle:
                    handle.write(json.dumps(row) + "\n")
                print(
                    f"{backend:9s} {high} to {low}  {name:18s} {k:3d} low  {row['average_bits']:.3f} bits  "
                    f"ppl {numbers['perplexity']:.3f}  KL {numbers['kl']:.4f}  {row['seconds']:.1f} s",
                    flush=True,
                )


def average(refs: Sequence[LayerRef], schemes: Sequence[LayerScheme]) -> float:
    """Counted bits a weight."""
    stored = [s.weight.storage_bits(ref.shape) for ref, s in zip(refs, schemes, strict=True) if s.weight]
    return sum(stored) / sum(math.prod(ref.shape) for ref in refs)


if __name__ == "__main__":
    main(*sys.argv[1:])
