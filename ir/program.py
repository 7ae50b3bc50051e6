"""A program: a graph over ATen and the `llmc` dialect, its weights, and the facts that the graph can't hold."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph_module import _assign_attr

from ..kernels.ops.op import Op
from .caches import Cache
from .nodes import copy_metadata, keep_only, set_value, set_where, value_of
from .nodes import where as where
from .signature import Signature
from .stages import Stage
from .weights import Weight


@dataclass(frozen=True)
class Miss:
    """The reason why a pass left a node alone."""

    reason: str
    node: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.node}{f' in {self.where}' if self.where else ''}: {self.reason}"


@dataclass(frozen=True)
class PassRecord:
    """The result of one pass that ran on a program."""

    name: str
    matches: int
    misses: tuple[Miss, ...]
    seconds: float
    stage: Stage


@dataclass(eq=False)
class Program:
    """A model between capture and lowering. It runs on real tensors at every stage.

    Without caches, `program(tokens, positions)` returns logits. With caches, `run` takes `(tokens, starts, *caches)`
    and returns `(logits, *caches)`, in the order of `caches` and of the tensors of each. After SelectLogits, `run` also
    takes the indices of the tokens whose logits it returns. `arguments` puts inputs in order for any program.

    Attributes:
        module: the graph. A weight is a `get_attr` node whose target is the weight's name; the module holds a meta
            tensor of that name.
        weights: the weights by name, as unevaluated expressions.
        stage: the last stage that the program reached.
        source: the name of the model that was captured, for messages.
        max_seq_len: the program must serve the positions 0 to `max_seq_len` - 1.
        signature: the inputs by role.
        history: the passes that ran on the program, in order.
        caches: the KV caches of the attentions; empty before InsertKvCache.
    """

    module: fx.GraphModule
    weights: dict[str, Weight]
    stage: Stage
    source: str
    max_seq_len: int
    signature: Signature
    history: list[PassRecord] = field(default_factory=list)
    caches: tuple[Cache, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """A list of the nodes in order; the graph may change while it is iterated."""
        return list(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def tokens(self) -> fx.Node:
        """The input with the token ids, [B, S]."""
        return self._input(self.signature.tokens)

    @property
    def positions(self) -> fx.Node:
        """The input with the positions, [B, S], of a program without caches."""
        return self._input(self.signature.positions)

    @property
    def starts(self) -> fx.Node:
        """The input with the number of tokens that each sequence has in the caches, [B], of a program with caches."""
        return self._input(self.signature.starts)

    @property
    def wanted(self) -> fx.Node | None:
        """The input with the indices of the tokens whose logits are wanted, [R]; None if all are."""
        return None if self.signature.wanted is None else self._input(self.signature.wanted)

    def _input(self, name: str | None) -> fx.Node:
        assert name is not None, f"a {self.stage} program has no such input"
        (node,) = (node for node in self.inputs if str(node.target) == name)
        return node

    @property
    def output(self) -> fx.Node:
        """The node whose value is the program's first output, the logits."""
        (end,) = self.graph.find_nodes(op="output")
        return end.args[0][0]

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake tensor mode of all example values of this graph."""
        return value_of(self.tokens).fake_mode

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run on real tensors and return the logits."""
        return self.run(*inputs)[0]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run and return all outputs. Each weight is evaluated at its first use and released after its last."""
        with torch.no_grad():
            return _Run(self).run(*inputs)

    def arguments(self, roles: Mapping[str, Tensor], caches: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the arguments of `run` in order, from inputs by role; roles that the program lacks are ignored."""
        names, others = self.signature.roles, iter(caches)
        inputs = [str(node.target) for node in self.inputs]
        return [roles[names[name]] if name in names else next(others) for name in inputs]

    def empty_caches(self, batch: int) -> list[Tensor]:
        """Return zeros for all tensors of all caches, for `batch` sequences."""
        return [
            torch.zeros(batch, cache.heads, cache.length, part.width, dtype=part.dtype)
            for cache in self.caches
            for part in cache.tensors
        ]

    def ops(self) -> Counter[str]:
        """Count the calls of each op, by name: `llmc.rms_norm`, `aten.add`."""
        return Counter(op_name(node) for node in self.nodes if node.op == "call_function")

    def __str__(self) -> str:
        from .printer import to_python

        return to_python(self)

    def __repr__(self) -> str:
        return f"<Program of {self.source}: {self.stage}, {len(self.graph.nodes)} nodes, {len(self.weights)} weights>"

    # Building blocks of passes -----------------------------------------------------------------------------------

    def call(self, target: Op | Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point and compute its example value.

        Args:
            like: a node whose module path the new node gets.
        """
        overload = target.overload if isinstance(target, Op) else target
        node = self.graph.call_function(overload, args, kwargs)
        set_where(node, where(like))
        set_value(node, self.infer(overload, args, kwargs))
        return node

    def infer(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the example value of a call; arguments may be nodes."""
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda node: value_of(node))
        shape_env = self.fake_mode.shape_env
        with self.fake_mode, torch.no_grad(), shape_env.suppress_guards() if shape_env else contextlib.nullcontext():
            return target(*real_args, **real_kwargs)

    def weight_of(self, node: object) -> Weight | None:
        """Return the weight of a `get_attr` node; None for any other argument."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights[str(node.target)]
        return None

    def add_weight(self, name: str, weight: Weight, like: fx.Node) -> fx.Node:
        """Return a node for a weight; if another weight has the name, a number is appended to it."""
        name = self._free_name(name, weight)
        self.weights[name] = weight
        _assign_attr(weight.meta(), self.module, name)
        for node in self.graph.find_nodes(op="get_attr", target=name):
            return node
        with self.graph.inserting_after(self.inputs[-1]):
            node = self.graph.get_attr(name)
        with self.fake_mode:
            set_value(node, torch.empty(weight.shape, dtype=weight.dtype))
        set_where(node, where(like))
        return node

    def add_input(self, name: str, value: Tensor, after: fx.Node) -> fx.Node:
        """Insert an input after the input `after`, with an example value."""
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name)
        set_value(node, value)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Replace `old` by `new` in all users of `old`, and remove `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def replace_with(self, old: fx.Node, target: Op | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Replace `old` by a call; all arguments must precede `old` in the graph."""
        with self.graph.inserting_before(old):
            new = self.call(target, *args, like=old, **kwargs)
        self.replace(old, new)
        return new

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """Insert a node for one of several values of a call."""
        item = self.graph.call_function(operator.getitem, (node, index))
        keep_only(item, value_of(node)[index], where(node))
        return item

    def sweep(self) -> int:
        """Remove nodes without users, and weights without a node; return the number of removed nodes."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        named = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        for name in [name for name in self.weights if name not in named]:
            del self.weights[name]
        return before - len(self.graph.nodes)

    def copy(self) -> Program:
        """Copy the program; the copy can change independently, and shares weights and example values."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copy_metadata(node, copied[node])
        module = fx.GraphModule({name: weight.meta() for name, weight in self.weights.items()}, graph)
        return replace(self, module=module, weights=dict(self.weights), history=list(self.history))

    def _free_name(self, name: str, weight: Weight) -> str:
        if not self._can_hold(name):
            name = name.replace(".", "_")
        candidate, number = name, 1
        while not self._can_hold(candidate) or (
            candidate in self.weights and self.weights[candidate].key != weight.key
        ):
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def _can_hold(self, name: str) -> bool:
        """Return True if the module can hold a tensor of this name.

        A module can't hold tensors named `w` and `w.scaled` at the same time.
        """
        *path, last = name.split(".")
        owner: Any = self.module
        for part in path:
            owner = getattr(owner, part, None)
            if not isinstance(owner, nn.Module):
                return owner is None
        return not isinstance(getattr(owner, last, None), nn.Module)


class _Run(fx.Interpreter):
    """Run the graph. A `get_attr` node returns the weight expression; its first user evaluates it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.program = program

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Weight:
        return self.program.weights[target]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for node in n.all_input_nodes:
            if isinstance(weight := self.env[node], Weight):
                self.env[node] = weight.evaluate()
        return super().fetch_args_kwargs_from_env(n)


def op_name(node: fx.Node) -> str:
    """Return the op's name without overload, such as `llmc.rms_norm` or `aten.add`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._schema.name.split('::')[1]}"
    return getattr(node.target, "__name__", str(node.target))


def layer_of(node: fx.Node) -> str:
    """Return the name of the repeated layer that a node came from; empty outside of layers."""
    return layer_in(where(node))


def layer_in(path: str) -> str:
    """Return a module's path up to its first number, such as `model.layers.0`; empty if it has no number."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""
