"""Running lists of passes. A compilation has one runner: its fuel, dump and log span all lists and all graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CompilerError, LlmcError, UsageError
from ..ir.printer import to_python
from ..ir.program import PassRecord, Program
from ..ir.stages import Stage, verify
from .base import Fuel, Pass, PassResult, Reach

Watch = Callable[[Pass, PassResult], None]


@dataclass(frozen=True)
class PassRun:
    """One pass as it was run.

    Attributes:
        graph: the graph of the artifact that it was run for, such as "prefill"; empty if for all of them.
        record: matches, misses with their reasons, seconds.
    """

    graph: str
    record: PassRecord


class Runner:
    """Runs lists of passes in order, over one program or over several that become graphs of one artifact.

    Attributes:
        log: every pass that was run, in order.

    Args:
        fuel: how many rewrites all lists together may do; by default what LLMC_FUEL says.
        dump: folder for the program before the first and after each pass, as numbered Python files.
        watch: called after each pass.
    """

    def __init__(
        self, *, fuel: Fuel | None = None, dump: Path | None = None, watch: Watch = lambda subject, result: None
    ) -> None:
        self.fuel = fuel or Fuel.from_environment()
        self.watch = watch
        self.log: list[PassRun] = []
        self._dump = None if dump is None else _Dump(dump)

    def run(self, program: Program, passes: Sequence[Pass], *, graph: str = "", until: Stage | None = None) -> Program:
        """Run a list from its first pass to its last, in place.

        Args:
            graph: name of the graph that the program becomes, if it becomes only one.
            until: stop when this stage is reached. If fuel runs out, stop at the last stage that the program reached.

        Raises:
            CompilerError: PASS_ORDER, or what the verifier finds after a pass.
            UsageError: FUEL_TOO_LOW if a stage is out of reach without more rewrites and `until` is not given.
        """
        check_order(passes, program)
        if self._dump:
            self._dump.begin(program)
        for subject in passes:
            if until is not None and program.stage >= until:
                break
            if isinstance(subject, Reach) and self.fuel.empty and not _can_reach(program, subject.stage):
                if until is not None:
                    break
                raise self._too_low(subject, f"the program is not {subject.stage} yet")
            self._run_one(program, subject, graph)
        return program

    def branch(self) -> Runner:
        """Return a runner that goes on from here with the same fuel left, for a trial that may be repeated."""
        other = Runner(fuel=self.fuel.copy(), watch=self.watch)
        other.log, other._dump = list(self.log), self._dump
        return other

    def _run_one(self, program: Program, subject: Pass, graph: str) -> None:
        try:
            result = subject(program, self.fuel)
        except CompilerError as error:
            if self.fuel.empty and self.fuel.amount is not None:
                raise self._too_low(subject, error.what.rstrip(".")) from error
            raise
        self.log.append(PassRun(graph, program.history[-1]))
        self.watch(subject, result)
        if self._dump:
            self._dump.write(f"{graph} {subject.name}".strip(), program, program.history[-1])

    def _too_low(self, subject: Pass, why: str) -> UsageError:
        return UsageError(
            "FUEL_TOO_LOW",
            f"LLMC_FUEL={self.fuel.amount} does not allow the rewrites that {subject.name} relies on: {why}.",
            "Set it higher; `llmc inspect` shows how many rewrites each pass does.",
        )


def check_order(passes: Sequence[Pass], done: Program | None = None) -> None:
    """Refuse a list in which a pass comes before one that it must follow, or before the stage that it needs.

    Args:
        done: the program that the list continues; None for one that was just captured.
    """
    earlier_names = [record.name for record in done.history] if done else []
    names = [*earlier_names, *(p.name for p in passes)]
    reached = done.stage if done else Stage.CAPTURED
    for place, subject in enumerate(passes, len(earlier_names)):
        if subject.reaches is not None and subject.reaches <= reached:
            raise _wrong_order(f"{subject.name} leads back from {reached}.")
        for earlier in subject.after:
            if earlier.__name__ not in names[:place]:
                raise _wrong_order(f"{subject.name} comes before {earlier.__name__}.")
        if subject.needs > reached:
            raise _wrong_order(f"{subject.name} needs a program that is {subject.needs}.")
        reached = subject.reaches or reached


def _wrong_order(what: str) -> CompilerError:
    return CompilerError("PASS_ORDER", what, "Reorder the list of passes.")


def _can_reach(program: Program, stage: Stage) -> bool:
    """Return True if the program already satisfies the spec of `stage`."""
    try:
        verify(replace(program, stage=stage))
    except LlmcError:
        return False
    return True


class _Dump:
    """A folder of programs as numbered Python files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def begin(self, program: Program) -> None:
        """Write the program that the first list starts from."""
        if not self.count:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(str(program.stage), program, [program.source])

    def write(self, title: str, program: Program, record: PassRecord) -> None:
        """Write the program after a pass, with its matches, misses and time on top."""
        self._write(title, program, [f"{record.matches} matches, {record.seconds * 1e3:.0f} ms", *record.misses])

    def _write(self, title: str, program: Program, notes: Sequence[object]) -> None:
        name = "".join(c if c.isalnum() else "_" for c in title).strip("_")
        text = "".join(f"# {note}\n" for note in (title, *notes)) + to_python(program)
        (self.folder / f"{self.count:02d}_{name}.py").write_text(text, encoding="utf-8")
        self.count += 1
