"""Capture a module as a program with `torch.export`.

Batch and sequence sizes are symbolic. Parameters are not read or copied: each becomes a weight expression.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils._sympy.numbers import int_oo

from ...errors import LlmcError
from ...ir.nodes import keep_only, known_value, value_of
from ...ir.program import Program
from ...ir.signature import Signature
from ...ir.stages import Stage, verify
from ...ir.weights import Weight, constant, parameter
from ...kernels.ops.attention_mask import MaskRule
from .hooks import Attention, capturing, is_hookable
from .refusal import is_about_sizes, quiet, refusal
from .skeleton import fake_parameters

# Sizes of the example inputs. They differ from any head count or hidden size, so that no dim is mistaken for another.
_BATCH, _LENGTH = 3, 23


def trace(module: nn.Module, weights: Mapping[str, Weight], source: str, max_seq_len: int) -> Program:
    """Capture `(tokens[B,S], positions[B,S]) -> logits[B,S,V]`.

    Args:
        module: the model. Its parameters may be on the meta device.
        weights: values of the module's parameters and persistent buffers, by name. A name that is missing here takes
            its value from the module.
        source: name of the model, for messages and the printer.
        max_seq_len: length of the longest sequence that the program must support.
    """
    exported = _export(LogitsOf(module), max_seq_len)
    _check_sizes(exported, source, max_seq_len)
    _check_values(exported, source)
    program = _to_program(exported, module, weights, source, max_seq_len)
    program.sweep()
    verify(program)
    return program


class LogitsOf(nn.Module):
    """Wrap a model so that it maps (tokens, positions) to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.arguments = _calling_convention(model)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        # Give both inputs the same batch and sequence size, even if the model ignores the positions.
        torch._check(tokens.shape[0] == positions.shape[0])
        torch._check(tokens.shape[1] == positions.shape[1])
        out = self.model(**self.arguments(tokens, positions))
        if isinstance(out, (tuple, list)):
            out = out[0]
        logits = getattr(out, "logits", out)
        # Some LM heads drop or flatten the batch dim. A program always returns [B, S, V].
        return logits.view(tokens.shape[0], tokens.shape[1], logits.shape[-1])


def _calling_convention(model: nn.Module) -> Callable[[Tensor, Tensor], dict[str, Any]]:
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters:
        flags = {k: v for k, v in {"use_cache": False, "return_dict": True}.items() if k in parameters}
        has_positions = "position_ids" in parameters
        return lambda tokens, positions: {
            "input_ids": tokens,
            **flags,
            **({"position_ids": positions} if has_positions else {}),
        }
    names = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(names) not in (1, 2):
        raise LlmcError(
            "FORWARD_UNKNOWN",
            f"{type(model).__name__}.forward takes {names or 'no argument'}, not (tokens) or (tokens, positions).",
            "Wrap it in a module whose forward takes (tokens) or (tokens, positions) and returns logits.",
        )
    return lambda tokens, positions: dict(zip(names, (tokens, positions), strict=False))


def _export(module: LogitsOf, max_seq_len: int) -> ExportedProgram:
    """Export with the first working combination of attention and strictness.

    The cheapest combination is tried first.

    If none works, the refusal reports the first error that the model itself caused.
    """
    attempts: list[tuple[Attention, bool]] = [
        (Attention.HOOKED, False), (Attention.EAGER, False), (Attention.HOOKED, True),
    ]  # fmt: skip
    if not is_hookable(module.model):
        attempts = [(Attention.EAGER, False), (Attention.EAGER, True)]
    was_training = module.model.training
    module.eval()
    reason: Exception | None = None
    # True once the model has used its mask as a tensor. Such an error comes from the hook, which passes a `MaskRule`
    # instead of a tensor, and does not describe the model.
    reads_masks = False
    try:
        for attention, strict in attempts:
            if reads_masks and attention is Attention.HOOKED:
                continue
            try:
                with quiet(), capturing(module.model, max_seq_len, attention), torch.no_grad():
                    return _export_once(module, strict)
            except Exception as error:
                if isinstance(error, LlmcError) and error.code in _FINAL:
                    raise
                if reason is None or reads_masks:
                    reason = error
                reads_masks = reads_masks or MaskRule.__name__ in str(error)
                if is_about_sizes(error):
                    break
    finally:
        module.train(was_training)
    assert reason is not None
    raise refusal(module.model, reason) from reason


# Errors that no other attempt can avoid.
_FINAL = frozenset({"MASK_UNKNOWN", "EXPERTS_UNKNOWN"})


def _export_once(module: LogitsOf, strict: bool) -> ExportedProgram:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    shapes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with fake_parameters(module, mode):
        with mode:
            tokens = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
            positions = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
        exported = torch.export.export(module, (tokens, positions), dynamic_shapes=(shapes, shapes), strict=strict)
        if any(_is_mutable(node) for node in exported.graph.nodes):
            exported = exported.run_decompositions({})
    return exported


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _check_sizes(exported: ExportedProgram, source: str, max_seq_len: int) -> None:
    """Refuse an exported graph that is valid only for some batch or sequence sizes."""
    inputs = [n for n in exported.graph.find_nodes(op="placeholder") if n.name in exported.graph_signature.user_inputs]
    for size, name in zip(value_of(inputs[0]).shape, ("batch", "sequence"), strict=True):
        if isinstance(size, torch.SymInt):
            allowed = exported.range_constraints[size.node.expr]
            if allowed.lower <= 2 and (name == "batch" or allowed.upper >= max_seq_len):
                continue
            valid = f"{allowed.lower} {'or more' if allowed.upper == int_oo else f'to {allowed.upper}'}"
        else:
            valid = str(size)
        raise LlmcError(
            "CAPTURE_SPECIALIZED",
            f"{source} branches on the {name} size: the captured graph is valid only for {valid}.",
            "Set max_seq_len within that range, or write the branch as operations on whole tensors.",
        )


def _check_values(exported: ExportedProgram, source: str) -> None:
    """Refuse a graph with numbers or shapes that depend on tensor values."""
    for node in exported.graph.nodes:
        if free_unbacked_symbols(known_value(node)):
            raise LlmcError(
                "CAPTURE_DATA_DEPENDENT",
                f"{source} computes with a number that depends on a tensor's values ({node.target} in {_path(node)}).",
                "Write that part with masks, torch.where or a top-k of fixed size.",
            )


def _to_program(
    exported: ExportedProgram, module: nn.Module, weights: Mapping[str, Weight], source: str, max_seq_len: int
) -> Program:
    """Turn an exported graph into a program.

    Lifted parameters, buffers and constants become weights. The logits become the only output.
    """
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    values = _Values(exported, module, weights)
    table: dict[str, Weight] = {}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            name, table[name] = values.of(specs[node.name])
            copied[node] = next(iter(graph.find_nodes(op="get_attr", target=name)), None) or graph.get_attr(name)
        elif node.op == "output":
            (logits,) = (s.arg.name for s in exported.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT)
            graph.output((next(new for old, new in copied.items() if old.name == logits),))
            break
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        keep_only(copied[node], known_value(node), _path(node))
    root = {name: weight.meta() for name, weight in table.items()}
    tokens, positions = (str(node.target) for node in graph.find_nodes(op="placeholder"))
    signature = Signature(tokens, positions)
    return Program(fx.GraphModule(root, graph), table, Stage.CAPTURED, source, max_seq_len, signature)


def _path(node: fx.Node) -> str:
    """Path of the module that made the call, without the `LogitsOf` wrapper's prefix."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return path.removeprefix("model").removeprefix(".") if path.startswith("model") else ""


class _Values:
    """Find the value of each lifted input. Tied parameters become one weight."""

    def __init__(self, exported: ExportedProgram, module: nn.Module, weights: Mapping[str, Weight]) -> None:
        self.exported, self.weights = exported, weights
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.buffers = dict(module.named_buffers(remove_duplicate=False))
        self.aliases: dict[int, list[str]] = {}
        for name, tensor in self.parameters.items():
            self.aliases.setdefault(id(tensor), []).append(name)

    def of(self, spec: InputSpec) -> tuple[str, Weight]:
        """Name and value of the weight that replaces an input of the exported graph."""
        name = str(spec.target).removeprefix("model.")
        if spec.kind is InputKind.PARAMETER:
            names = self.aliases[id(self.parameters[name])]
            stored = next((n for n in names if n in self.weights), None)
            return names[0], self.weights[stored] if stored else parameter(self.parameters[name], name)
        if spec.kind is InputKind.BUFFER:
            return name, self.weights.get(name) or constant(self.buffers[name], name)
        value = self.exported.constants[str(spec.target)]
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            raise LlmcError(
                "CAPTURE_FAILED",
                f"The model creates the constant {name} during tracing, so its value is not known.",
                "Register it as a buffer when the module is built.",
            )
        return name, constant(value, name)
