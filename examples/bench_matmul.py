"""Measure ONNX Runtime's matmuls with quantized weights alone.

Their time is a lower bound of the time of a decode step.

    python examples/bench_matmul.py

It prints two tables: one large matmul, and a chain of the matmuls of the 135M demo's 30 layers without other ops. The
graphs of a table run in turns, so that other load on the machine affects all of them equally. Codes and scales are
random.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

ROUNDS = 60
WIDE = [(2048, 8192)]
DEMO = [(576, 960), (960, 576), (576, 3072), (3072, 576)] * 30


class Grid(NamedTuple):
    bits: int
    group: int
    zero_points: bool = False
    raised: float = 0.0
    """Share of the matrices that have 8 bits and groups of 64 instead."""

    def __str__(self) -> str:
        zeros = " with zero points" if self.zero_points else ""
        raised = f", {self.raised:.0%} of the matrices on 8 bits" if self.raised else ""
        return f"{self.bits} bits, groups of {self.group}{zeros}{raised}"


def chain(shapes: list[tuple[int, int]], grid: Grid, threads: int) -> ort.InferenceSession:
    """Build a chain of MatMulNBits nodes for one token.

    There is one node for each (inputs, outputs) of `shapes`.
    """
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i, (inputs, outputs) in enumerate(shapes):
        bits, group, zero_points, _ = Grid(8, 64) if rng.random() < grid.raised else grid
        groups = -(-inputs // group)
        arrays = {
            f"codes{i}": rng.integers(0, 256, (outputs, groups, group * bits // 8), dtype=np.uint8),
            f"scales{i}": rng.random(outputs * groups, dtype=np.float32),
        }
        if zero_points:
            arrays[f"zeros{i}"] = rng.integers(0, 256, outputs * -(-groups * bits // 8), dtype=np.uint8)
        weights += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [f"x{i}", *arrays],
                [f"x{i + 1}"],
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=bits,
                block_size=group,
                accuracy_level=4,
            )
        )
    x = helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, shapes[0][0]])
    y = helper.make_tensor_value_info(f"x{len(shapes)}", TensorProto.FLOAT, [1, shapes[-1][1]])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "chain", [x], [y], weights), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.spin_duration_us", "300")  # as the engine does
    return ort.InferenceSession(model.SerializeToString(), options)


def medians(sessions: list[ort.InferenceSession]) -> list[float]:
    """Median microseconds per call of each session.

    In a turn, a session runs seven calls. The first two wake its threads and are not measured.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, durations in zip(sessions, times, strict=True):
            x = np.zeros(session.get_inputs()[0].shape, np.float32)
            for call in range(7):
                start = time.perf_counter()
                session.run(None, {"x0": x})
                if call >= 2:
                    durations.append(1e6 * (time.perf_counter() - start))
    return [statistics.median(durations) for durations in times]


def table(title: str, shapes: list[tuple[int, int]], grids: list[Grid]) -> None:
    times = medians([chain(shapes, grid, threads) for grid in grids for threads in (1, 2)])
    print(f"| {title} | one core, us | two cores, us |\n|---|--:|--:|")
    for grid, one, two in zip(grids, times[::2], times[1::2], strict=True):
        print(f"| {grid} | {one:.0f} | {two:.0f} |")
    print(flush=True)


def main() -> None:
    table("[1, 2048] x [2048, 8192]", WIDE, [Grid(4, 32), Grid(4, 64), Grid(4, 128), Grid(8, 128)])
    small = [Grid(4, 64), Grid(4, 32), Grid(4, 32, True)]
    table("30 layers of the demo", DEMO, [*small, *(grid._replace(raised=0.27) for grid in small)])


if __name__ == "__main__":
    main()
