"""Weight expressions equal torch's results and read one leaf at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmc.errors import LlmcError
from llmc.ir.weights import (
    Call,
    Leaf,
    SafetensorsSource,
    Weight,
    cast,
    concat,
    constant,
    fold,
    parameter,
    record,
    recorded,
    transpose,
)

aten = torch.ops.aten


class Disk:
    """Records the reads of tensors and the peak bytes of those that are alive."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.alive: dict[str, int] = {}
        self.peak = 0

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        self.reads.append(name)
        self.alive[name] = tensor.nbytes
        self.peak = max(self.peak, sum(self.alive.values()))
        # Watch the storage, because views of the tensor keep it alive too.
        weakref.finalize(tensor.untyped_storage(), self.alive.pop, name, None)
        return tensor


@dataclass(frozen=True)
class Instrumented:
    """A source whose reads are recorded."""

    disk: Disk = field(compare=False)
    name: str
    value: Tensor

    shape = property(lambda self: tuple(self.value.shape))
    dtype = property(lambda self: self.value.dtype)
    nbytes = property(lambda self: self.value.nbytes)
    key = property(lambda self: f"{self.name} on disk {id(self.disk):x}")

    def read(self) -> Tensor:
        return self.disk.hold(self.name, self.value.clone())


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, disk: Disk | None = None) -> Leaf:
    return Leaf(Instrumented(disk or Disk(), f"w{seed}", values(*shape, seed=seed, dtype=dtype)))


A, B = values(4, 6), values(4, 6, seed=1)

# Expressions from the constructors and from recorded code, with the results of eager torch.
BUILT: dict[str, tuple[Callable[[Weight, Weight], Weight], Tensor]] = {
    "concat": (lambda a, b: concat([a, b, a], 0), torch.cat([A, B, A])),
    "concat along the last dim": (lambda a, b: concat([a, b], -1), torch.cat([A, B], -1)),
    "concat of one": (lambda a, b: concat([a], 0), A),
    "concat of two dtypes": (lambda a, b: concat([cast(a, torch.float64), b], 0), torch.cat([A.double(), B])),
    "transpose": (lambda a, b: transpose(a), A.T),
    "cast": (lambda a, b: cast(a, torch.bfloat16), A.bfloat16()),
    "fold a number": (lambda a, b: fold(a, 0.3), A * 0.3),
    "fold a weight": (lambda a, b: fold(a, b), A * B),
    "nested": (lambda a, b: concat([transpose(fold(a, b)), transpose(b)], 1), torch.cat([(A * B).T, B.T], 1)),
    "cat by keyword": (lambda a, b: Call(aten.cat.default, ([a, b],), {"dim": 1}), torch.cat([A, B], 1)),
    "stack by keyword": (lambda a, b: Call(aten.stack.default, ([a, b],), {"dim": -1}), torch.stack([A, B], -1)),
    "one of several results": (lambda a, b: Call(aten.split.Tensor, (a, 4, 1), output=1), A[:, 4:]),
    "a device among the arguments": (
        lambda a, b: Call(aten.zeros_like.default, (a,), {"device": torch.device("meta")}),
        torch.zeros(4, 6),
    ),
}
RECORDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stack": lambda a, b: torch.stack([a, b]),
    "stack in the middle": lambda a, b: torch.stack([a, b], dim=1),
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "chunk": lambda a, b: torch.chunk(a, 3, dim=1)[2],
    "split": lambda a, b: torch.split(a, [1, 2, 1])[1],
    "unbind": lambda a, b: a.unbind(1)[3],
    "transpose": lambda a, b: a.transpose(0, 1),
    "transpose, contiguous": lambda a, b: a.T.contiguous(),
    "permute": lambda a, b: a.unflatten(1, (2, 3)).permute(2, 0, 1),
    "view after a permute": lambda a, b: a.unflatten(0, (2, 2)).transpose(1, 2).reshape(4, 6),
    "flatten after a transpose": lambda a, b: a.T.flatten(),
    "interleave": lambda a, b: torch.stack([a, b], dim=1).reshape(8, 6),
    "index": lambda a, b: a[1:3, ::2],
    "arithmetic": lambda a, b: (a + 1) * b - a / 2,
    "cast": lambda a, b: a.to(torch.float16),
    "experts": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1).transpose(1, 2),
}


def _check(weight: Weight, expected: Tensor) -> None:
    assert (weight.shape, weight.dtype, weight.nbytes) == (tuple(expected.shape), expected.dtype, expected.nbytes)
    got = weight.evaluate()
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", BUILT)
def test_expressions_equal_torch(name: str) -> None:
    build, expected = BUILT[name]
    disk = Disk()
    weight = build(leaf(4, 6, disk=disk), leaf(4, 6, seed=1, disk=disk))
    assert disk.reads == []
    _check(weight, expected)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_code_equals_torch(name: str) -> None:
    code = RECORDED[name]
    disk = Disk()
    weight = recorded(code(record(leaf(4, 6, disk=disk)), record(leaf(4, 6, seed=1, disk=disk))))
    assert disk.reads == []
    _check(weight, code(A, B))


@pytest.mark.parametrize("change", [lambda t: t.add_(1), lambda t: t[0].zero_(), lambda t: t.copy_(t + 1)])
def test_code_that_changes_a_tensor_in_place_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(LlmcError, match="in place") as caught:
        change(record(leaf(4, 6)))
    assert caught.value.code == "WEIGHTS_UNRECORDABLE"


def test_a_cast_to_the_same_dtype_returns_the_weight() -> None:
    weight = leaf(4, 6)
    assert cast(weight, torch.float32) is weight


def test_a_tensor_that_was_not_recorded_is_a_constant() -> None:
    weight = recorded(A)
    assert weight.is_constant
    _check(weight, A)


def test_an_expression_is_constant_if_all_its_leaves_are() -> None:
    table, trained = constant(A, "table"), parameter(B, "trained")
    assert fold(table, table).is_constant
    assert not fold(table, trained).is_constant


def test_tensors_in_memory_are_not_copied() -> None:
    transposed = A.T
    _check(parameter(transposed, "w"), transposed)
    assert parameter(A, "w").evaluate().data_ptr() == A.data_ptr()


def test_leaves_are_in_order_and_repeated_for_each_use() -> None:
    a, b = leaf(4, 6), leaf(4, 6, seed=1)
    assert list(concat([a, fold(b, a)], 0).leaves()) == [a, b, a]


def test_merging_reads_one_part_at_a_time() -> None:
    disk = Disk()
    parts = [leaf(64, 8, seed=i, disk=disk) for i in range(4)]
    for merged in (concat(parts, 0), Call(aten.stack.default, (parts, 1))):
        disk.peak = 0
        merged.evaluate()
        assert disk.peak == 64 * 8 * 4
    # A concatenation of two stacks, as in checkpoints of experts.
    experts = concat([Call(aten.stack.default, (parts[:2],)), Call(aten.stack.default, (parts[2:],))], 1)
    disk.peak = 0
    _check(experts, torch.cat([torch.stack([p.source.value for p in half]) for half in (parts[:2], parts[2:])], 1))
    assert disk.peak == 64 * 8 * 4
    assert not disk.alive


# Calls with several results ------------------------------------------------------------------------------------------


def parts(weight: Weight) -> list[Weight]:
    """Split the first dimension into two halves."""
    return [Call(aten.split.Tensor, (weight, 2), output=i) for i in range(2)]


def test_a_call_with_several_results_is_computed_once() -> None:
    disk = Disk()
    for weight, expected in zip(parts(leaf(4, 6, disk=disk)), A.split(2), strict=True):
        _check(weight, expected)
        _check(weight, expected)
    assert disk.reads == ["w0"]


def test_only_the_results_of_the_last_call_are_cached() -> None:
    disk = Disk()
    one, other = parts(leaf(4, 6, disk=disk)), parts(leaf(4, 6, seed=1, disk=disk))
    for weight, expected in ((one[0], A[:2]), (other[0], B[:2]), (one[1], A[2:]), (one[0], A[:2])):
        _check(weight, expected)
    assert disk.reads == ["w0", "w1", "w0"]
    assert list(disk.alive) == ["w0"] and disk.peak == A.nbytes


def test_calls_with_different_arguments_are_cached_separately() -> None:
    weight = leaf(4, 6)
    _check(Call(aten.split.Tensor, (weight, 2), output=0), A[:2])
    _check(Call(aten.split.Tensor, (weight, 3), output=0), A[:3])
    _check(Call(aten.split.Tensor, (weight, 2, 1), output=0), A[:, :2])


def test_a_call_with_several_results_may_be_an_argument_of_another() -> None:
    disk = Disk()
    inner = parts(leaf(4, 6, disk=disk))
    outer = [Call(aten.split.Tensor, (inner[1], 3, 1), output=i) for i in range(2)]
    _check(outer[0], A[2:, :3])
    _check(outer[1], A[2:, 3:])
    _check(inner[1], A[2:])
    _check(Call(aten.max.dim, (inner[0], 1), output=0), A[:2].amax(1))
    assert not disk.alive, "the results of the inner call are cached besides those of the outer one"


def test_a_new_tensor_at_the_address_of_a_freed_one_is_a_different_weight() -> None:
    """The key of a tensor in memory is its address; cached results keep it alive."""
    for i in range(20):
        tensor = torch.full((4, 6), float(i))
        got = parts(parameter(tensor, "w"))[0].evaluate()
        assert (got == i).all()
        del tensor, got


# Keys ---------------------------------------------------------------------------------------------------------------

# Pairs of expressions that differ in one thing: a key that omits it is the same for both.
_SIMILAR: dict[str, tuple[Callable[[Weight], Weight], Callable[[Weight], Weight]]] = {
    "keyword": (
        lambda a: Call(aten.clamp.default, (a,), {"min": 0.1}),
        lambda a: Call(aten.clamp.default, (a,), {"max": 0.1}),
    ),
    "list": (
        lambda a: Call(aten.split_with_sizes.default, (a, [1, 2, 1]), output=0),
        lambda a: Call(aten.split_with_sizes.default, (a, [1, 2], 1), output=0),
    ),
    "output": (
        lambda a: Call(aten.split.Tensor, (a, 2), output=0),
        lambda a: Call(aten.split.Tensor, (a, 2), output=1),
    ),
    "number": (lambda a: fold(a, 2.0), lambda a: fold(a, 3.0)),
    "op": (lambda a: Call(aten.exp.default, (a,)), lambda a: Call(aten.expm1.default, (a,))),
    "order": (lambda a: concat([a, fold(a, 2.0)], 0), lambda a: concat([fold(a, 2.0), a], 0)),
}


@pytest.mark.parametrize("name", _SIMILAR)
def test_keys_are_equal_only_for_equal_expressions(name: str) -> None:
    one, other = _SIMILAR[name]
    disk = Disk()
    square, same = (leaf(4, 3, disk=disk) for _ in range(2))
    assert one(square).key == one(same).key
    assert one(square).key != other(square).key


def _saved(folder: Path, value: Tensor) -> SafetensorsSource:
    folder.mkdir()
    save_file({"w": value}, folder / "model.safetensors")
    return SafetensorsSource(folder / "model.safetensors", "w", tuple(value.shape), value.dtype, value.nbytes)


def test_the_key_of_a_file_includes_its_real_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = _saved(tmp_path / "one", A), _saved(tmp_path / "other", B)
    assert one.key != other.key
    assert torch.equal(one.read(), A) and torch.equal(other.read(), B)
    # The hub's cache links to files, and a path may be relative.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    for path in (Path("one/model.safetensors"), tmp_path / "link" / "model.safetensors"):
        assert SafetensorsSource(path, "w", one.shape, one.dtype, one.nbytes).key == one.key


def test_the_key_of_a_tensor_in_memory_does_not_depend_on_its_name() -> None:
    assert parameter(A, "head").key == parameter(A, "embed").key
    assert parameter(A, "head").key != parameter(A.clone(), "head").key


class Memory(TorchDispatchMode):
    """Records the peak bytes of all live storages created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "cpu":
            self.hold(result)
        return result

    def hold(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (address := storage._cdata) not in self.alive:
            self.alive[address] = storage.nbytes()
            self.peak = max(self.peak, sum(self.alive.values()))
            weakref.finalize(storage, self.alive.pop, address)
        return tensor


def test_peak_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"w{i}": torch.full((512, 1024), float(i)) for i in range(16)}, path)
    memory, reads = Memory(), []

    class Watched(SafetensorsSource):
        def read(self) -> Tensor:
            reads.append(self.name)
            return memory.hold(super().read())

    parts = [Leaf(Watched(path, f"w{i}", (512, 1024), torch.float32, 2 << 20)) for i in range(16)]
    merged = [cast(concat(parts[i : i + 2], 0), torch.float16) for i in range(0, 16, 2)]
    with memory:
        for index, weight in enumerate(merged):
            value = weight.evaluate()
            assert value[0, 0] == 2 * index and value[-1, -1] == 2 * index + 1
            del value
    assert sorted(reads) == sorted(f"w{i}" for i in range(16))
    assert not memory.alive
    largest = 4 << 20  # two concatenated parts before the cast
    assert largest <= memory.peak < 1.6 * largest
