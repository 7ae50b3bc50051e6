"""Which pass is blamed: the first that changes the numbers without being meant to."""

from __future__ import annotations

from check_pass import inputs
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.gate.bisect import find_faulty_pass
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import fold
from llmc.passes.base import Fuel, Pass, PassResult
from llmc.passes.optimize.drop_layers import DropLayers
from llmc.passes.pipeline import optimizing_passes


class Break(Pass):
    """A miscompile."""

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        name = next(name for name in program.weights if "down_proj" in name)
        program.weights[name] = fold(program.weights[name], -1.0)
        return PassResult(1)


def blamed(passes: list[Pass]) -> str | None:
    program = llmc.capture(tiny_model("llama"), until=Stage.CAPTURED)
    found = find_faulty_pass(program, passes, inputs(2, 9)[0], 1e-3)
    return found and found.step


def test_layers_that_go_on_purpose_are_nobodys_fault() -> None:
    passes = optimizing_passes(["model.layers.0"])
    assert sum(isinstance(subject, DropLayers) for subject in passes) == 1
    assert blamed(passes) is None
    place = next(i for i, subject in enumerate(passes) if isinstance(subject, DropLayers))
    for at in (place, place + 1, len(passes)):
        assert blamed([*passes[:at], Break(), *passes[at:]]) == "Break"
