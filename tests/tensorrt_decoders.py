"""Decoders as ONNX files, with the inputs and outputs of target "trt" and random weights, for tests of builds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from llmc.runtimes.artifact.manifest import CacheSpec
from llmc.runtimes.engines.tensorrt.section import DATA, GRAPH, Profile, TensorRtSection

PREFILL_TOKENS, DECODE_BATCH = 64, 4

_NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_ONNX = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder, and the formats of its weights.

    Attributes:
        scheme: of the linears in layers: "none", "int8", "int4", "fp8" or "w8a8". The last two have inputs in 8 bits,
            with a scale for each token. "int8 in groups" has a scale for each group, which TensorRT has no kernel for.
        wide: of the LM head and the embedding: "none" or "int8".
        merge_qkv: one linear makes queries, keys and values.
        merge_gate_up: one linear makes the gate and the value that it is multiplied with.
        untransposed: weights are stored [inputs, outputs], so that nothing transposes them.
        composed: attention is written in basic ops.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 256
    vocab: int = 512
    length: int = 256
    dtype: str = "fp16"
    scheme: str = "none"
    group: int = 64
    wide: str = "none"
    tied: bool = True
    merge_qkv: bool = False
    merge_gate_up: bool = False
    untransposed: bool = False
    scale_queries: bool = False
    composed: bool = False

    @property
    def caches(self) -> list[CacheSpec]:
        """The caches as the manifest describes them."""
        one = CacheSpec("static", self.kv_heads, self.head_dim, self.head_dim, self.length, self.dtype)  # type: ignore[arg-type]
        return [one] * self.layers

    def section(self, tokens: int = PREFILL_TOKENS, batch: int = DECODE_BATCH) -> TensorRtSection:
        """Return a section with a prefill and a decode profile of these sizes."""
        profiles = {"prefill": Profile(1, tokens), "decode": Profile(batch, 1)}
        return TensorRtSection(GRAPH, self.dtype, profiles)  # type: ignore[arg-type]


def write_decoder(decoder: Decoder, folder: Path) -> Path:
    """Write the graph and its data file into a folder; return the path of the graph."""
    with _Writer(decoder, folder / DATA) as writer:
        model = writer.decoder()
    path = folder / GRAPH
    path.write_bytes(model.SerializeToString())
    return path


class _Writer:
    def __init__(self, decoder: Decoder, data: Path) -> None:
        self.d = decoder
        self.nodes: list[Any] = []
        self.initializers: list[TensorProto] = []
        self.random = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.02
        self.data = data.open("wb")
        self.inputs_on_grid: dict[str, tuple[str, str]] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.data.close()

    # Nodes and values

    def op(
        self, kind: str, *inputs: str, outputs: Sequence[str] | None = None, name: str = "", **attributes: Any
    ) -> str:
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        made = list(outputs or [name])
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made[0]

    def integers(self, values: Sequence[int] | int) -> str:
        name = f"integers_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, np.shape(values), np.ravel(values)))
        return name

    def number(self, value: float) -> str:
        return self.small(np.asarray(value))

    def small(self, values: np.ndarray) -> str:
        name = f"numbers_{len(self.initializers)}"
        raw = values.astype(_NUMPY[self.d.dtype]).tobytes()
        self.initializers.append(helper.make_tensor(name, _ONNX[self.d.dtype], values.shape, raw, raw=True))
        return name

    def external(self, name: str, kind: int, shape: Sequence[int], content: bytes) -> str:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        self.data.write(bytes(-self.data.tell() % 4096))
        for key, value in (("location", DATA), ("offset", self.data.tell()), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(content)
        self.initializers.append(tensor)
        return name

    def numbers(self, count: int) -> np.ndarray:
        """Return random numbers, other ones on each call: equal weights would be stored once."""
        self.random = np.roll(self.random, 7919)
        return np.resize(self.random, count)

    def weight(self, name: str, out: int, into: int, scheme: str) -> str:
        """Return a matrix [out, into], or [into, out] where weights are stored untransposed."""
        turned = self.d.untransposed
        shape, axis = ([into, out], 1) if turned else ([out, into], 0)
        numbers = self.numbers(out * into)
        if scheme == "none":
            return self.external(name, _ONNX[self.d.dtype], shape, numbers.astype(_NUMPY[self.d.dtype]).tobytes())
        if scheme == "int4":
            groups = into // self.d.group
            codes = np.clip(np.rint(numbers * 100), -8, 7).astype(np.int8)
            packed = (codes[0::2] & 15) | ((codes[1::2] & 15) << 4)
            stored = self.external(name, TensorProto.INT4, shape, packed.astype(np.uint8).tobytes())
            return self.dequantized(stored, self.scales([groups, out] if turned else [out, groups], 0.01), 1 - axis)
        if scheme == "fp8":
            raw = (numbers * 1000).astype(ml_dtypes.float8_e4m3fn).tobytes()
            stored = self.external(name, TensorProto.FLOAT8E4M3FN, shape, raw)
        else:
            raw = np.clip(np.rint(numbers * 1000), -127, 127).astype(np.int8).tobytes()
            stored = self.external(name, TensorProto.INT8, shape, raw)
        if scheme == "int8 in groups":
            return self.dequantized(stored, self.scales([out, into // self.d.group], 0.001), 1)
        return self.op("DequantizeLinear", stored, self.scales([out], 0.001), axis=axis)

    def dequantized(self, codes: str, scales: str, axis: int) -> str:
        return self.op("DequantizeLinear", codes, scales, axis=axis, block_size=self.d.group)

    def scales(self, shape: Sequence[int], size: float) -> str:
        return self.small(np.reshape(size * (1 + self.numbers(math.prod(shape))), shape))

    def linear(self, x: str, name: str, out: int, into: int, scheme: str | None = None) -> str:
        scheme = self.d.scheme if scheme is None else scheme
        weight = self.weight(f"{name}.weight", out, into, scheme)
        turned = weight if self.d.untransposed else self.op("Transpose", weight, perm=[1, 0])
        if scheme not in ("fp8", "w8a8"):
            return self.op("MatMul", x, turned)
        codes, scale = self.on_grid(x, scheme)
        return self.op("Mul", self.op("MatMul", codes, turned), scale)

    def on_grid(self, x: str, scheme: str) -> tuple[str, str]:
        """Return the input of a linear in 8 bits, and the scale of each token."""
        if x not in self.inputs_on_grid:
            kind, largest = (TensorProto.FLOAT8E4M3FN, 448.0) if scheme == "fp8" else (TensorProto.INT8, 127.0)
            most = self.op("ReduceMax", self.op("Abs", x), self.integers([-1]), keepdims=1)
            scale = self.op("Mul", self.op("Max", most, self.number(2.0**-14)), self.number(1 / largest))
            one = self.number(1.0)
            codes = self.op("QuantizeLinear", self.op("Div", x, scale), one, output_dtype=kind)
            self.inputs_on_grid[x] = self.op("DequantizeLinear", codes, one), scale
        return self.inputs_on_grid[x]

    # The graph

    def decoder(self) -> ModelProto:
        d = self.d
        angles = np.outer(np.arange(d.length), 10000.0 ** (-np.arange(0, d.head_dim, 2) / d.head_dim))
        self.cos, self.sin = self.small(np.cos(angles)), self.small(np.sin(angles))
        count = self.op("Shape", "input_ids", start=1, end=2)
        steps = self.op("Range", self.integers(0), self.op("Squeeze", count), self.integers(1))
        self.positions = self.op("Add", self.op("Unsqueeze", "starts", self.integers([1])), steps)  # [B, S]
        slots = self.integers(list(range(d.length)))
        seen_to = self.op("Unsqueeze", self.positions, self.integers([1, 3]))
        self.mask = self.op("LessOrEqual", slots, seen_to)  # [B, 1, S, T]
        embedding = self.weight("embedding", d.vocab, d.hidden, d.wide) if not d.untransposed else self._table()
        x = self.op("Gather", embedding, "input_ids", axis=0)
        for layer in range(d.layers):
            x = self.op("Add", x, self.attention(self.norm(x), layer))
            x = self.op("Add", x, self.mlp(self.norm(x), layer))
        x = self.norm(self.op("Gather", x, "rows", axis=1))
        if d.tied and not d.untransposed:
            logits = self.op("MatMul", x, self.op("Transpose", embedding, perm=[1, 0]))
        else:
            logits = self.linear(x, "head", d.vocab, d.hidden, d.wide)
        self.op("Cast", logits, to=TensorProto.FLOAT, outputs=["logits"])
        graph = helper.make_graph(self.nodes, "decoder", *self._borders(), self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)

    def _table(self) -> str:
        d = self.d
        raw = self.numbers(d.vocab * d.hidden).astype(_NUMPY[d.dtype]).tobytes()
        return self.external("embedding", _ONNX[d.dtype], [d.vocab, d.hidden], raw)

    def norm(self, x: str) -> str:
        gain = self.small(np.ones(self.d.hidden))
        return self.op("RMSNormalization", x, gain, axis=-1, epsilon=1e-5)

    def attention(self, x: str, layer: int) -> str:
        d = self.d
        sizes = [d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim]
        if d.merge_qkv:
            merged = self.linear(x, f"layers.{layer}.qkv", sum(sizes), d.hidden)
            parts = [f"layers.{layer}.{one}" for one in "qkv"]
            self.op("Split", merged, self.integers(sizes), axis=-1, outputs=parts)
        else:
            parts = [
                self.linear(x, f"layers.{layer}.{one}", size, d.hidden) for one, size in zip("qkv", sizes, strict=True)
            ]
        q, k, v = (
            self.heads(part, count) for part, count in zip(parts, (d.heads, d.kv_heads, d.kv_heads), strict=True)
        )
        q, k = (self.op("RotaryEmbedding", one, self.cos, self.sin, self.positions) for one in (q, k))
        past, present = f"past_key_values.{layer}", f"present.{layer}"
        for made, part in ((k, "key"), (v, "value")):
            self.op("TensorScatter", f"{past}.{part}", made, "starts", axis=2, outputs=[f"{present}.{part}"])
        if d.scale_queries or d.composed:
            q = self.op("Mul", q, self.number(d.head_dim**-0.5))
        scale = 1.0 if d.scale_queries else d.head_dim**-0.5
        caches = f"{present}.key", f"{present}.value"
        if d.composed:
            out = self.composed(q, *caches)
        else:
            out = self.op("Attention", q, *caches, self.mask, scale=scale, name=f"attention.{layer}")
        out = self.op("Reshape", self.op("Transpose", out, perm=[0, 2, 1, 3]), self.integers([0, 0, -1]))
        return self.linear(out, f"layers.{layer}.o", d.hidden, d.heads * d.head_dim)

    def composed(self, q: str, keys: str, values: str) -> str:
        d = self.d
        stacked = self.op("Reshape", q, self.integers([0, d.kv_heads, -1, d.head_dim]))
        scores = self.op("MatMul", stacked, self.op("Transpose", keys, perm=[0, 1, 3, 2]))
        by_head = self.op("Reshape", scores, self.integers([0, d.heads, -1, d.length]))
        bias = self.op("Where", self.mask, self.number(0.0), self.number(-1e4))
        weights = self.op("Softmax", self.op("Add", by_head, bias), axis=3)
        weights = self.op("Reshape", weights, self.integers([0, d.kv_heads, -1, d.length]))
        return self.op("Reshape", self.op("MatMul", weights, values), self.integers([0, d.heads, -1, d.head_dim]))

    def heads(self, x: str, count: int) -> str:
        split = self.op("Reshape", x, self.integers([0, 0, count, self.d.head_dim]))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def mlp(self, x: str, layer: int) -> str:
        d = self.d
        if d.merge_gate_up:
            merged = self.linear(x, f"layers.{layer}.gate_up", 2 * d.ffn, d.hidden)
            gate, up = f"layers.{layer}.gate", f"layers.{layer}.up"
            self.op("Split", merged, self.integers([d.ffn, d.ffn]), axis=-1, outputs=[gate, up])
        else:
            gate, up = (self.linear(x, f"layers.{layer}.{one}", d.ffn, d.hidden) for one in ("gate", "up"))
        act = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.linear(act, f"layers.{layer}.down", d.hidden, d.ffn)

    def _borders(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        d, kind = self.d, _ONNX[self.d.dtype]
        integers = {"input_ids": ["B", "S"], "starts": ["B"], "rows": ["R"]}
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name, dims in integers.items()]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "R", d.vocab])]
        for layer in range(d.layers):
            for part in ("key", "value"):
                shape = ["B", d.kv_heads, d.length, d.head_dim]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", kind, shape))
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", kind, shape))
        return inputs, outputs
