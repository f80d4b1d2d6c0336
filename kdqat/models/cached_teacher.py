"""A teacher that answered beforehand: `kdqat cache` asks it once about every row, training reads its answers.

Training then needs neither the teacher's memory nor its forward pass, and epoch after epoch the same answers serve.
Two kinds of answers are kept (docs/teachers.md has their sizes): the last hidden states, which with the teacher's head
are exactly its logits, or the k likeliest tokens with their log-probabilities and the probability of all others.

    [hidden states]  file -> GPU -> the teacher's own head, the only part of it that is there, chunk by chunk
    [top k]          file -> GPU
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdqat.files import cache_root, sha256_of, tokenizer_fingerprint
from kdqat.models.head_only import answer_with, head_of, head_only, load_head
from kdqat.models.source import ModelSource
from kdqat.models.split import SplitModel, cut_vocabulary
from kdqat.models.teacher import FrozenTeacher, Teacher
from kdqat.models.teacher_cache import TeacherCache, missing_rows, row_bytes
from kdqat.models.top_k import as_outputs, ids_dtype, top_k_of
from kdqat.types import Batch, Outputs, TopKOutputs

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when what is stored, or how rows get their keys, changes
_SHARD_BYTES = 1 << 27
_SAME_ANSWERS = (
    "self",
    "path",
    "revision",
    "trust_remote_code",
    "compile",
    "offload",
)  # of a FrozenTeacher's arguments


class CachedTeacher(Teacher):
    """Answers of `teacher` from a folder that `kdqat cache` filled.

    Args:
        teacher: who fills the folder, and who answers the text of evaluators; None: FrozenTeacher().
        kind: "top_k", the k likeliest tokens; "hidden", the last hidden states, exact and larger.
        k: tokens kept at every position; for "top_k" only.
        folder: where the answers lie; None: in the cache root, one folder for each teacher and kind.

    Raises:
        ValueError: for k below 1.
    """

    def __init__(
        self,
        teacher: FrozenTeacher | None = None,
        *,
        kind: Literal["top_k", "hidden"] = "top_k",
        k: int = 64,
        folder: str | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"CachedTeacher: k must be at least 1, not {k}: 64 suits most teachers")
        self.teacher = teacher if teacher is not None else FrozenTeacher()
        self.kind = kind
        self.k = k
        self.folder = folder
        self.cache: TeacherCache | None = None
        self.split: SplitModel | None = None  # the teacher without weights; of hidden states with those of the head

    def prepare(self, source: ModelSource, student: SplitModel, tokenizer: Any, *, pristine: bool) -> None:
        """Find the folder and check that it is this teacher's; the teacher itself is not loaded.

        Raises:
            ValueError: if the folder holds answers of another teacher, tokenizer or kind, or the models do not fit.
        """
        if self.cache is not None:
            return
        filler = self.teacher
        own = filler.own_source(source)
        if own.same_weights(source):
            split = head_only(copy.deepcopy(student.model.config), own)
        else:
            split = head_only(own.load_config(), own)
            cut = cut_vocabulary(student, split, lambda: (tokenizer, own.load_tokenizer()))
            if cut:
                log.info(cut)
        vocabulary = split.vocab_size or split.num_logits
        if self.kind == "top_k" and self.k > vocabulary:
            raise ValueError(f"CachedTeacher: k={self.k} exceeds the {vocabulary} tokens of {own.path}: lower it")
        arguments = [name for name in inspect.signature(type(filler).__init__).parameters if name not in _SAME_ANSWERS]
        identity = {
            "version": FORMAT_VERSION,
            "kind": self.kind,
            **({"k": self.k, "vocabulary": vocabulary} if self.kind == "top_k" else {}),
            **{name: getattr(filler, name) for name in arguments},
            "model": own.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer) or sha256_of(tokenizer.get_vocab()),
        }
        cache = TeacherCache(self._folder(own, identity), identity, tuple(_kinds(self, split, 1)))
        if self.kind == "hidden" and (state := cache.read_head()) is not None:
            load_head(split, state)
        self.cache, self.split, self._about = cache, split, own.path

    def require_answers(self, keys: Callable[[], Sequence[bytes]], wants: frozenset[str]) -> None:
        """See `Teacher.require_answers`."""
        self._require_no_extras(wants)
        listed = keys()
        if missing := {listed[number] for number in self.missing(listed)}:
            assert self.cache is not None
            found = sum(key not in missing for key in listed)
            raise ValueError(missing_rows(self.cache.folder, found, len(listed)))

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """The positions in `keys` of rows that nobody answered yet; of equal rows the first only."""
        assert self.cache is not None, "prepare() comes first"
        headless = self.kind == "hidden" and self.cache.read_head() is None
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        return sorted(number for key, number in first.items() if headless or key not in self.cache)

    def row_bytes(self, seq_len: int) -> int:
        """Bytes that the answer to a row of `seq_len` tokens takes."""
        assert self.split is not None, "prepare() comes first"
        return row_bytes(_kinds(self, self.split, seq_len))

    def fill(self, batches: Iterable[Batch]) -> Generator[int, None, None]:
        """Let the live teacher, which is prepared and placed, answer `batches` on its device.

        What was answered is on disk when a shard is full and when the iterator ends or is closed.

        Yields:
            How many rows the batch had that was answered.

        Raises:
            ValueError: if an answer is not a number.
        """
        assert self.cache is not None and self.split is not None and self.teacher.split is not None
        self.cache.begin(self._about)
        if self.kind == "hidden":
            self.cache.write_head(head_of(self.teacher.split).state_dict())
            load_head(self.split, self.cache.read_head() or {})
        waiting: list[tuple[Sequence[bytes], dict[str, Tensor]]] = []
        try:
            for batch in batches:
                answer = self._ask(batch)
                waiting.append((batch.row_keys or (), answer))
                num_rows = sum(len(keys) for keys, _ in waiting)
                if num_rows * self.row_bytes(batch.input_ids.shape[1]) >= _SHARD_BYTES:
                    self._write(waiting)
                yield len(batch.input_ids)
        finally:
            self._write(waiting)

    def place(self, device: torch.device, shard: Callable[[nn.Module], None] | None = None) -> None:
        """Only the head needs a place; every rank has all of it."""
        assert self.split is not None, "prepare() comes first"
        if self.kind == "hidden":
            head_of(self.split).to(device)

    def release(self) -> None:
        self.cache = self.split = None

    def use_eager_attention(self) -> None:
        self._require_no_extras(frozenset({"attentions"}))

    def judge(self) -> Teacher:
        """The live teacher: nobody cached the text of evaluators."""
        return self.teacher

    def outputs(self, batch: Batch, wants: frozenset[str] = frozenset()) -> Outputs | TopKOutputs:
        """Read the answer to a batch.

        Raises:
            ValueError: if a row is not cached, or more is wanted than was.
        """
        assert self.cache is not None and self.split is not None, "prepare() comes first"
        self._require_no_extras(wants)
        if batch.row_keys is None:
            raise ValueError(
                "CachedTeacher: this batch has no row_keys to find its answers by: use kdqat's data modules "
                "(Rows.batch sets them), or a FrozenTeacher"
            )
        stored = self.cache.read(batch.row_keys, batch.input_ids.device)
        if self.kind == "top_k":
            return as_outputs(stored)
        return answer_with(self.split, batch, stored["hidden"])

    def _folder(self, own: ModelSource, identity: dict[str, Any]) -> Path:
        if self.folder is not None:
            return Path(self.folder).expanduser()
        name = re.sub(r"\W+", "-", own.path.rstrip("/").rpartition("/")[2]).strip("-")[:40]
        return cache_root() / "teachers" / f"{name}-{self.kind}-{sha256_of(identity)[:16]}"

    def _ask(self, batch: Batch) -> dict[str, Tensor]:
        answer = self.teacher.outputs(batch)
        stored = top_k_of(answer, self.k) if self.kind == "top_k" else {"hidden": answer.hidden}
        if any(bool(tensor.isnan().any()) for tensor in stored.values() if tensor.is_floating_point()):
            raise ValueError("the teacher's answers are not numbers: load it in float32 or bfloat16 (teacher.dtype)")
        return {name: tensor.cpu() for name, tensor in stored.items()}

    def _write(self, waiting: list[tuple[Sequence[bytes], dict[str, Tensor]]]) -> None:
        """One shard for each length of rows that waits."""
        assert self.cache is not None
        taken = list(waiting)
        waiting.clear()
        for length in dict.fromkeys(next(iter(t.values())).shape[1] for _, t in taken):
            parts = [(keys, t) for keys, t in taken if next(iter(t.values())).shape[1] == length]
            tensors = {name: torch.cat([t[name] for _, t in parts]) for name in parts[0][1]}
            self.cache.write([key for keys, _ in parts for key in keys], tensors)

    def _require_no_extras(self, wants: frozenset[str]) -> None:
        if wants:
            raise ValueError(
                f"CachedTeacher keeps no {' and no '.join(sorted(wants))}, which the loss wants: use a FrozenTeacher, "
                "or a loss on logits alone (ForwardKL)"
            )


def _kinds(teacher: CachedTeacher, split: SplitModel, seq_len: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is stored of a row: type and shape of each tensor."""
    if teacher.kind == "hidden":
        width: int = split.model.get_output_embeddings().weight.shape[1]  # type: ignore[operator]
        return {"hidden": (getattr(torch, teacher.teacher.dtype), (seq_len, width))}
    dtype = ids_dtype(split.vocab_size or split.num_logits)
    top = (seq_len, teacher.k)
    return {"ids": (dtype, top), "log_probs": (torch.float16, top), "log_tail": (torch.float32, (seq_len,))}
