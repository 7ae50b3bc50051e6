"""Print programs as readable Python that can be executed.

The text defines `forward(weights, <inputs>)`, such as `forward(weights, tokens, positions)`; `from_python` executes
it. A blank line and a comment mark the start of each module.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..kernels.ops import all_ops, op_of
from .nodes import known_value, value_of, where

if TYPE_CHECKING:
    from .program import Program

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}  # fmt: skip


# The names that a printed program may use, besides its own values and the ops of the dialect.
_GLOBALS: dict[str, Any] = {
    "aten": torch.ops.aten,
    "torch": torch,
    "inf": float("inf"),
    "nan": float("nan"),
    **{fn.__name__: fn for fn in (torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float)},
}


def to_python(program: Program) -> str:
    """Return the source of a Python function that computes the program."""
    lines = [f"# {program.source}, {program.stage}", f"def forward(weights, {', '.join(map(str, program.inputs))}):"]
    names = _Names(program)
    previous = None
    for node, line in _statements(program, names).items():
        module = where(node)
        if module != previous:
            lines += ["", f"    # {module or 'the program'}"]
            previous = module
        lines.append(f"    {line}")
    (output,) = program.graph.find_nodes(op="output")
    return "\n".join([*lines, "", f"    return {names.show(output.args[0])}"]) + "\n"


def statements(program: Program) -> dict[fx.Node, str]:
    """Return the line of `to_python`'s text for each call, without indentation."""
    return _statements(program, _Names(program))


def _statements(program: Program, names: _Names) -> dict[fx.Node, str]:
    calls = [node for node in program.nodes if node.op == "call_function"]
    return {node: f"{names[node]} = {_call(node, names)}{_comment(node, names)}" for node in calls}


def from_python(text: str) -> Callable[..., tuple[Tensor, ...]]:
    """Compile the text of `to_python` into a function.

    Its first argument maps weight names to tensors.
    """
    namespace = {"llmc": _Namespace(all_ops()), **_GLOBALS}
    exec(compile(text, "<llmc program>", "exec"), namespace)
    return namespace["forward"]


class _Namespace:
    def __init__(self, members: Mapping[str, Any]) -> None:
        self.__dict__.update(members)


class _Names:
    """The Python names of nodes: B and S for input sizes, else the node's name."""

    def __init__(self, program: Program) -> None:
        self.of: dict[fx.Node, str] = {}
        self.sizes = _size_symbols(program)
        taken = {str(node) for node in program.inputs} | {"weights", "llmc", *_GLOBALS}
        for node in program.nodes:
            if node.op in ("call_function", "placeholder"):
                name = self._size_name(node) or re.sub(r"\W", "_", node.name)
                while keyword.iskeyword(name) or (name in taken and node.op != "placeholder"):
                    name += "_"
                taken.add(name)
                self.of[node] = name

    def __getitem__(self, node: fx.Node) -> str:
        return self.of[node]

    def _size_name(self, node: fx.Node) -> str | None:
        value = known_value(node)
        if isinstance(value, torch.SymInt) and node.target is torch.ops.aten.sym_size.int:
            return self.sizes.get(str(value))
        return None

    def show(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"weights[{json.dumps(value.target)}]" if value.op == "get_attr" else self.of[value]
        if isinstance(value, (list, tuple)):
            items = ", ".join(self.show(x) for x in value)
            if isinstance(value, list):
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, slice):
            return f"slice({self.show(value.start)}, {self.show(value.stop)}, {self.show(value.step)})"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        return repr(value)

    def dim(self, size: Any) -> str:
        return re.sub(r"s\d+", lambda m: self.sizes.get(m.group(), m.group()), str(size))


def _size_symbols(program: Program) -> dict[str, str]:
    value = value_of(program.tokens)
    return {str(size): name for size, name in zip(value.shape, "BS", strict=False) if isinstance(size, torch.SymInt)}


def _call(node: fx.Node, names: _Names) -> str:
    arguments = [names.show(a) for a in node.args] + [f"{k}={names.show(v)}" for k, v in node.kwargs.items()]
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        return f"{arguments[0]}[{arguments[1]}]"
    if symbol := _OPERATORS.get(getattr(target, "__name__", "")):
        left, right = (f"({a})" if a.startswith("-") else a for a in arguments)
        return f"{left} {symbol} {right}"
    return f"{_callee(target)}({', '.join(arguments)})"


_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "pow": "**",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip


def _callee(target: Any) -> str:
    if defined := op_of(target):
        return f"llmc.{defined.name}"
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name.removeprefix('aten::')}"
        return f"aten.{name}.{target._overloadname}"
    if target.__name__ == "neg":
        return "-"
    return target.__name__


def _comment(node: fx.Node, names: _Names) -> str:
    value = known_value(node)
    if not isinstance(value, Tensor):
        return ""
    return f"  # {_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(names.dim(size) for size in value.shape)}]"
