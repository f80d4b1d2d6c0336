"""An offloaded teacher answers bit for bit what a resident one does, however early or late its copies happen.

On the CPU a copier of the test's own stands for the stream: "eager" copies at once, the earliest a GPU could, "late"
only when somebody waits for it, the latest.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdqat.models import FrozenTeacher, ModelSource, SplitModel, blocks_of
from kdqat.models.offload import BlockOffload
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.types import Batch

CPU = torch.device("cpu")
IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))


class FakeCopier:
    """Copies at once, or when waited for; notes which host buffer went into which room, and when."""

    def __init__(self, late: bool) -> None:
        self.late, self.events = late, list[tuple[str, int]]()
        self.numbers: dict[int, int] = {}

    def start(self, room: Tensor, host: Tensor) -> Any:
        number = self.numbers.setdefault(host.data_ptr(), len(self.numbers))
        self.events.append(("copy", number))
        pending = [(room, host, number)]
        if not self.late:
            self._copy(pending)
        else:
            room.fill_(255)  # NaN in every float format: what is computed with before the copy is there shows
        return pending, number

    def wait(self, ticket: Any) -> None:
        pending, number = ticket
        self.events.append(("compute", number))
        self._copy(pending)

    def _copy(self, pending: list[Any]) -> None:
        for room, host, _ in pending:
            room[: host.numel()].copy_(host)
        pending.clear()


class Chain(nn.Module):
    """Blocks of different sizes and dtypes, one after another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        widths = [7 + 2 * i for i in range(depth)]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, w), nn.Tanh(), nn.Linear(w, 5)) for w in widths)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def offloaded(model: Chain, late: bool) -> FakeCopier:
    copier = FakeCopier(late)
    BlockOffload(list(model.blocks), device=CPU, copier=copier, pin=False)
    return copier


@pytest.mark.parametrize("late", [False, True], ids=["eager", "late"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_the_answers_are_those_of_the_resident_model(depth: int, late: bool) -> None:
    resident = Chain(depth)
    model = copy.deepcopy(resident)
    offloaded(model, late)
    for _ in range(3):
        x = torch.randn(2, 5)
        assert torch.equal(model(x), resident(x))


def test_a_block_is_copied_while_the_one_before_it_computes() -> None:
    model = Chain(4)
    copier = offloaded(model, late=False)  # numbers host buffers by their first copies: in the order of the blocks
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=index: copier.events.append(("done", i)))
    model(torch.randn(2, 5))
    first = [("copy", 0), ("compute", 0), ("copy", 1), ("done", 0), ("compute", 1), ("copy", 2), ("done", 1),
             ("compute", 2), ("copy", 3), ("done", 2), ("compute", 3)]  # fmt: skip
    end = [("copy", 0), ("done", 3)]  # for the next batch, which finds it there
    assert copier.events == first + end
    model(torch.randn(2, 5))
    assert copier.events == first + end + first[1:] + end


def test_two_blocks_stay_where_they_are_after_the_first_batch() -> None:
    model = Chain(2)
    copier = offloaded(model, late=False)
    for _ in range(3):
        model(torch.randn(2, 5))
    assert [event for event in copier.events if event[0] == "copy"] == [("copy", 0), ("copy", 1)]


@pytest.mark.parametrize("late", [False, True], ids=["eager", "late"])
def test_a_block_called_out_of_turn_and_a_pass_that_failed_half_way_are_right_too(late: bool) -> None:
    resident = Chain(5)
    model, x = copy.deepcopy(resident), torch.randn(2, 5)
    offloaded(model, late)
    for index in (3, 0, 0, 4, 1):
        assert torch.equal(model.blocks[index](x), resident.blocks[index](x))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4))
    assert torch.equal(model(x), resident(x))


def test_the_device_holds_two_blocks_and_no_more() -> None:
    model = Chain(6)
    copier = FakeCopier(late=False)
    offload = BlockOffload(list(model.blocks), device=CPU, copier=copier, pin=False)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert len(storages) == 2 and offload.host_bytes >= sum(p.numel() * 4 for p in model.parameters())


def test_blocks_that_share_a_parameter_are_refused() -> None:
    model = Chain(2)
    model.blocks[1][2].bias = model.blocks[0][2].bias
    with pytest.raises(ValueError, match="share a parameter"):
        offloaded(model, late=False)


def placed(device: torch.device, model: Any = None, **options: Any) -> FrozenTeacher:
    source, teacher = ModelSource("toy:llama"), FrozenTeacher(**options)
    teacher.prepare(source, SplitModel(model or source.load_model()), toy_tokenizer(), pristine=True)
    teacher.place(device)
    return teacher


def test_a_whole_teacher_answers_the_same_bits_from_two_rooms() -> None:
    model = deep_llama()
    resident, teacher = placed(CPU, model), placed(CPU, model)
    assert teacher.split is not None
    BlockOffload(blocks_of(teacher.split.model), device=CPU, copier=FakeCopier(late=True), pin=False)
    for _ in range(2):
        wanted = frozenset({"hidden_states"})
        ours, theirs = (t.outputs(Batch(IDS, IDS), wanted) for t in (teacher, resident))
        assert torch.equal(ours.head(ours.hidden), theirs.head(theirs.hidden))
        assert all(map(torch.equal, ours.extras["hidden_states"], theirs.extras["hidden_states"]))


def test_without_a_gpu_there_is_nowhere_to_copy_to() -> None:
    with pytest.raises(ValueError, match=r"model\.teacher\.offload: .*it computes on cpu; leave offload out"):
        placed(CPU, offload=True)


def test_what_offload_does_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match="offload and compile exclude each other"):
        FrozenTeacher(offload=True, compile=True)
    source, teacher = ModelSource("toy:llama"), FrozenTeacher(offload=True)
    teacher.prepare(source, SplitModel(source.load_model()), toy_tokenizer(), pristine=True)
    with pytest.raises(ValueError, match=r"model\.teacher\.offload and model\.parallel\.shard exclude each other"):
        teacher.place(CPU, lambda split: None)


def deep_llama() -> Any:
    """toy:llama with 5 blocks: an odd count, more than two."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(toy_model("llama").config)
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_on_a_gpu_the_offloaded_teacher_answers_the_same_bits(fp8: bool) -> None:
    """Wide blocks (some 100 MB each), many batches queued without waiting: copies and compute do overlap."""
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 7, "num_attention_heads": 16}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=260, num_key_value_heads=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    resident = placed(device, model, fp8=fp8)
    torch.cuda.synchronize()
    batches = [torch.randint(3, 256, (4, 128 + 64 * i), device=device) for i in range(6)]
    expected = [resident.outputs(Batch(ids, ids)).hidden.cpu() for ids in batches]
    resident.release()
    before = torch.cuda.memory_allocated()
    teacher = placed(device, model, fp8=fp8, offload=True)
    teacher.place(torch.device("cuda"))  # evaluation places once more
    on_device = torch.cuda.memory_allocated() - before
    assert on_device < 0.5 * sum(p.numel() * p.element_size() for p in teacher.split.parameters())  # type: ignore[union-attr]
    answers = [teacher.outputs(Batch(ids, ids)).hidden for ids in batches]  # queued, not waited for
    assert all(torch.equal(answer.cpu(), wanted) for answer, wanted in zip(answers, expected, strict=True))
