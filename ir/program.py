"""A program: a graph over ATen and the `llmc` dialect, with the weights and facts that the graph can't hold."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph_module import _assign_attr

from ..kernels.ops.op import Op
from .stages import Stage
from .weights import Weight


@dataclass(frozen=True)
class Miss:
    """Why a pass left something alone, and the node that was the reason."""

    reason: str
    node: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.node}{f' in {self.where}' if self.where else ''}: {self.reason}"


@dataclass(frozen=True)
class PassRecord:
    """What a pass did to this program."""

    name: str
    matches: int
    misses: tuple[Miss, ...]
    seconds: float
    stage: Stage


@dataclass(frozen=True)
class CacheInput:
    """One of the tensors that make a cache, [B, heads, length, width].

    Attributes:
        name: of the program's input.
        role: what it holds: "key", "value", "key_scale" or "value_scale".
    """

    name: str
    role: str
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Cache:
    """The keys and values that one attention keeps: inputs of the program, and as many outputs that follow them.

    A back end makes output and input one piece of memory; in the program they are two values.

    Attributes:
        keys, values: names of the inputs.
        ring: slots are used again after `length` positions; otherwise position p lies in slot p.
        window: how many positions back anybody looks, None for all.
        dtype: of the numbers, or of the codes of rounded ones, which have a scale for each head of each token.
        key_scales, value_scales: names of the inputs with the scales; None where nothing is rounded.
    """

    keys: str
    values: str
    heads: int
    key_dim: int
    value_dim: int
    length: int
    ring: bool
    window: int | None
    dtype: torch.dtype
    key_scales: str | None = None
    value_scales: str | None = None

    @property
    def tensors(self) -> tuple[CacheInput, ...]:
        """What it consists of, in the order of the program's inputs and outputs."""
        numbers = (
            CacheInput(self.keys, "key", self.key_dim, self.dtype),
            CacheInput(self.values, "value", self.value_dim, self.dtype),
        )
        if self.key_scales is None or self.value_scales is None:
            return numbers
        scales = ((self.key_scales, "key_scale"), (self.value_scales, "value_scale"))
        return *numbers, *(CacheInput(name, role, 1, torch.float32) for name, role in scales)


@dataclass(eq=False)
class Program:
    """A model on its way to an engine. It runs at every stage: `program(tokens, positions)`.

    With a cache it takes `(tokens, starts, *caches)` and `run` gives `(logits, *caches)`, in the order of `caches` and
    of the tensors of each. `rows` [R] stand behind `starts` where the caller chooses the rows of the logits.

    Attributes:
        module: the graph; a weight is a `get_attr` node whose target is its name, held here as a meta tensor.
        weights: the values behind those names, unevaluated.
        stage: how far it has come.
        source: what it was captured from, in words.
        max_seq_len: positions that it must serve, 0 to this minus one.
        history: the passes that made it, in order.
        caches: what its attentions keep from call to call; empty before there is a cache.
    """

    module: fx.GraphModule
    weights: dict[str, Weight]
    stage: Stage
    source: str
    max_seq_len: int
    history: list[PassRecord] = field(default_factory=list)
    caches: tuple[Cache, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """A snapshot of the nodes in order, safe to change the graph under."""
        return list(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def output(self) -> fx.Node:
        """The node whose value is the program's first output, the logits."""
        (end,) = self.graph.find_nodes(op="output")
        return end.args[0][0]

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that all example values of this graph live in."""
        return self.inputs[0].meta["val"].fake_mode

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run on real tensors and give the logits."""
        return self.run(*inputs)[0]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All outputs. Each weight is evaluated when it is first read and dropped after its last use."""
        with torch.no_grad():
            return _Run(self).run(*inputs)

    def ops(self) -> Counter[str]:
        """How often each op occurs, by name: `llmc.rms_norm`, `aten.add`."""
        return Counter(op_name(node) for node in self.nodes if node.op == "call_function")

    def __str__(self) -> str:
        from .printer import to_python

        return to_python(self)

    def __repr__(self) -> str:
        return f"<Program of {self.source}: {self.stage}, {len(self.graph.nodes)} nodes, {len(self.weights)} weights>"

    # Building blocks of passes -----------------------------------------------------------------------------------

    def call(self, target: Op | Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new node at the graph's insertion point, its example value computed, standing in the module of `like`."""
        overload = target.overload if isinstance(target, Op) else target
        node = self.graph.call_function(overload, args, kwargs)
        node.meta["where"] = where(like)
        node.meta["val"] = self.infer(overload, args, kwargs)
        return node

    def infer(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The example value of a call whose arguments may be nodes."""
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
        shape_env = self.fake_mode.shape_env
        with self.fake_mode, torch.no_grad(), shape_env.suppress_guards() if shape_env else contextlib.nullcontext():
            return target(*real_args, **real_kwargs)

    def weight_of(self, node: object) -> Weight | None:
        """The weight that a graph argument stands for, if it stands for one."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights[str(node.target)]
        return None

    def add_weight(self, name: str, weight: Weight, like: fx.Node) -> fx.Node:
        """A node for a weight; a name that is taken by another value gets a number."""
        name = self._free_name(name, weight)
        self.weights[name] = weight
        _assign_attr(weight.meta(), self.module, name)
        for node in self.graph.find_nodes(op="get_attr", target=name):
            return node
        with self.graph.inserting_after(self.inputs[-1]):
            node = self.graph.get_attr(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        node.meta["where"] = where(like)
        return node

    def add_input(self, name: str, value: Tensor, after: fx.Node) -> fx.Node:
        """An input behind the input `after`, with an example of its value."""
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` read `new`, and take `old` out."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def replace_with(self, old: fx.Node, target: Op | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Put a call where `old` stands; every argument must stand before it."""
        with self.graph.inserting_before(old):
            new = self.call(target, *args, like=old, **kwargs)
        self.replace(old, new)
        return new

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """A node for one of the values of a call that has several."""
        picked = self.graph.call_function(operator.getitem, (node, index))
        picked.meta.update(val=node.meta["val"][index], where=where(node))
        return picked

    def sweep(self) -> int:
        """Take out what nothing reads, and the weights that no node names any more; says how many nodes went."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        named = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        for name in [name for name in self.weights if name not in named]:
            del self.weights[name]
        return before - len(self.graph.nodes)

    def copy(self) -> Program:
        """A program that can be changed without changing this one; weights and example values are shared."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copied[node].meta = dict(node.meta)
        module = fx.GraphModule({name: weight.meta() for name, weight in self.weights.items()}, graph)
        return replace(self, module=module, weights=dict(self.weights), history=list(self.history))

    def _free_name(self, name: str, weight: Weight) -> str:
        if not self._has_room(name):
            name = name.replace(".", "_")
        candidate, number = name, 1
        while not self._has_room(candidate) or (
            candidate in self.weights and self.weights[candidate].key != weight.key
        ):
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def _has_room(self, name: str) -> bool:
        """Whether the module can hold a tensor by this name: no `w.scaled` beside a tensor `w`, nor the reverse."""
        *path, last = name.split(".")
        owner: Any = self.module
        for part in path:
            owner = getattr(owner, part, None)
            if not isinstance(owner, nn.Module):
                return owner is None
        return not isinstance(getattr(owner, last, None), nn.Module)


class _Run(fx.Interpreter):
    """Runs the graph. Weights stand at its head, so what they are there is the expression: its value comes later."""

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
    """`llmc.rms_norm` or `aten.add` for a call, whatever overload it calls."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._schema.name.split('::')[1]}"
    return getattr(node.target, "__name__", str(node.target))


def where(node: fx.Node) -> str:
    """The path of the module that this node came from, such as `model.layers.0.mlp`."""
    return node.meta.get("where", "")


def by_layer(program: Program) -> Iterator[tuple[str, list[fx.Node]]]:
    """Runs of consecutive calls that came from one repeated layer, or from outside of them (the empty name)."""
    run: list[fx.Node] = []
    name = ""
    for node in program.nodes:
        if node.op != "call_function":
            continue
        layer = layer_of(node)
        if layer != name and run:
            yield name, run
            run = []
        name = layer
        run.append(node)
    if run:
        yield name, run


def layer_of(node: fx.Node) -> str:
    """The repeated layer that this node came from; empty outside of them."""
    return layer_in(where(node))


def layer_in(path: str) -> str:
    """The part of a module's path up to its first number: `model.layers.0`; empty if there is none."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""
