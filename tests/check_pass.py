"""The test harness for passes.

A test names a pass and a small module. The module is captured, earlier passes run if the test lists them, and then
`check_pass` checks everything about the pass at once: the number of matches, the ops that must be gone or present, the
same numbers as before at several sizes, a result that can be printed and traced again, no matches in a second run. A
program with a cache gets sequences that start at different positions and caches filled with random numbers. All its
outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from llmc.compiler.frontend.capture import trace
from llmc.ir.printer import from_python, to_python
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.passes.base import Pass

VOCAB = 31
SIZES = ((2, 11), (1, 5), (3, 1))


def capture(
    module: nn.Module, *, first: Sequence[Pass] = (), stage: Stage = Stage.CAPTURED, max_seq_len: int = 32
) -> Program:
    """Capture `module`, run the passes `first` and set the stage to `stage`."""
    program = trace(module.eval(), {}, type(module).__name__, max_seq_len)
    for earlier in first:
        earlier(program)
    program.stage = stage
    return program


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return random tokens and their positions from 0, both [B, S]."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    tokens = torch.randint(0, VOCAB, (batch, length), generator=generator)
    return tokens, torch.arange(length).repeat(batch, 1)


# The value of the input `rows`, which chooses the logits to return.
ROWS = (-1, 0)


def samples(program: Program, batch: int, length: int) -> list[Tensor]:
    """Return a value for each input of a program.

    Values depend on the input's name and the size only, so they are the same for all programs.
    """
    tokens, positions = inputs(batch, length)
    generator = torch.Generator().manual_seed(length)
    starts = torch.randint(0, program.max_seq_len - length + 1, (batch,), generator=generator)
    values = {"tokens": tokens, "positions": positions, "starts": starts, "rows": torch.tensor(ROWS)}
    for cache in program.caches:
        for part in cache.tensors:
            numbers = torch.randn(batch, cache.heads, cache.length, part.width, generator=generator)
            values[part.name] = (50 * numbers).to(part.dtype) if part.dtype == torch.int8 else numbers.to(part.dtype)
    return [values[str(node.target)] for node in program.inputs]


def check_pass(
    subject: Pass,
    before: nn.Module | Program,
    *,
    matches: int,
    gone: Collection[str] = (),
    there: Collection[str] = (),
    miss: str | None = None,
    first: Sequence[Pass] = (),
    atol: float = 1e-5,
    expected: Callable[[Tensor], Tensor] = lambda logits: logits,
    again: int = 0,
) -> Program:
    """Run the pass `subject` on `before`, check the result and return it.

    Args:
        matches: the exact number of matches.
        gone, there: op names that must be absent or present after the pass.
        miss: text that the reason of one of the misses must contain.
        first: passes to run before it.
        expected: maps the logits before the pass to those after it, for a pass that changes them on purpose.
        again: the number of matches in a second run.
    """
    original = before if isinstance(before, Program) else capture(before, first=first, stage=subject.needs)
    program = original.copy()
    result = subject(program)

    reasons = [m.reason for m in result.misses]
    assert result.matches == matches, (
        f"{result.matches} matches instead of {matches}; misses: {list(map(str, result.misses))}"
    )
    ops = program.ops()
    assert not [name for name in gone if ops[name]], f"some of {gone} are not gone: {ops}"
    assert not [name for name in there if not ops[name]], f"some of {there} are absent: {ops}"
    assert miss is None or any(miss in reason for reason in reasons), f"no miss contains {miss!r}: {reasons}"

    for size in SIZES:
        logits, *caches = original.run(*samples(original, *size))
        torch.testing.assert_close(
            program.run(*samples(program, *size)), (expected(logits), *caches), atol=atol, rtol=0
        )
    check_rerun(program)

    assert subject(program.copy()).matches == again, "a second run finds another number of matches"
    return program


def check_rerun(program: Program) -> None:
    """Check that a program can be printed and traced again.

    The printed program must compute the same, and each node's call must infer the shape and dtype recorded for it.
    """
    rerun = from_python(to_python(program))
    values = {name: weight.evaluate() for name, weight in program.weights.items()}
    for size in SIZES:
        sample = samples(program, *size)
        for one, other in zip(rerun(values, *sample), program.run(*sample), strict=True):
            assert torch.equal(_as_bytes(one), _as_bytes(other))
    for node in program.nodes:
        if node.op != "call_function":
            continue
        inferred = program.infer(node.target, node.args, dict(node.kwargs))
        for got, recorded in zip(_tensors(inferred), _tensors(node.meta["val"]), strict=True):
            assert (list(map(str, got.shape)), got.dtype) == (list(map(str, recorded.shape)), recorded.dtype), node


def _as_bytes(x: Tensor) -> Tensor:
    """View float8 values, which torch cannot compare, as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _tensors(value: object) -> list[Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
