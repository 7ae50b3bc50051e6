"""The one harness of pass tests: what a pass must do, and what it must leave alone.

A test gives a pass and a small module; the module is captured, earlier passes run if the test names them, and then
the pass is held to everything at once: how often it matched, which ops went and came, that the numbers are
those of the program it was given, at the captured size and at others, that its result can be exported again,
that running it twice changes nothing more. A program with a cache is given rows that start at different positions and
caches full of numbers, and all that comes out is compared.
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
    """A program of `module` after the passes `first`, declared to have reached `stage`."""
    program = trace(module.eval(), {}, type(module).__name__, max_seq_len)
    for before in first:
        before(program)
    program.stage = stage
    return program


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    tokens = torch.randint(0, VOCAB, (batch, length), generator=generator)
    return tokens, torch.arange(length).repeat(batch, 1)


# What a program with an input `rows` is asked for.
ROWS = (-1, 0)


def samples(program: Program, batch: int, length: int) -> list[Tensor]:
    """A value for each input of a program, by its name; inputs of one name are the same for all programs."""
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
    """Run `subject` on `before` and hold it to its promise; the program that came out is returned.

    Args:
        matches: exactly how many places it must rewrite.
        gone, there: op names that must be absent or present after it.
        miss: words that the reason of one of its misses must contain.
        first: passes to run before it.
        expected: what the logits become, for a pass that changes them on purpose.
        again: matches that a second run still finds; 0 for a pass that reaches its end at once.
    """
    given = before if isinstance(before, Program) else capture(before, first=first, stage=subject.needs)
    program = given.copy()
    result = subject(program)

    reasons = [m.reason for m in result.misses]
    assert result.matches == matches, (
        f"{result.matches} matches, not {matches}; misses: {list(map(str, result.misses))}"
    )
    ops = program.ops()
    assert not [name for name in gone if ops[name]], f"still there: {ops}"
    assert not [name for name in there if not ops[name]], f"not there: {ops}"
    assert miss is None or any(miss in reason for reason in reasons), f"no miss says {miss!r}: {reasons}"

    for size in SIZES:
        logits, *caches = given.run(*samples(given, *size))
        torch.testing.assert_close(
            program.run(*samples(program, *size)), (expected(logits), *caches), atol=atol, rtol=0
        )
    check_rerun(program)

    assert subject(program.copy()).matches == again, "a second run still matches"
    return program


def check_rerun(program: Program) -> None:
    """The program as printed computes the same, and every node's recorded shape and dtype are what its call gives:
    the program can be traced again as it is."""
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
    """What can be compared, as float8 can't."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _tensors(value: object) -> list[Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
