"""A small decoder in ONNX with the inputs and outputs of target trt's artifacts, for tests of the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from interpreting import ELEMENTS, initializer, numbers
from onnx import TensorProto, helper

LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, VOCAB, LENGTH = 2, 32, 4, 2, 8, 48, 40, 12
SCALE = WIDTH**-0.5

Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Fault:
    """A mistake in the graph. The values are those of a right one.

    Attributes:
        scale: multiplies the scale of attention.
        swapped: True swaps keys and values.
        mask: how many positions beyond its own a token sees.
        slot: how many slots after their own new tokens are written.
    """

    scale: float = 1.0
    swapped: bool = False
    mask: int = 0
    slot: int = 0


class Decoder:
    """Writes the graph in one dtype, and holds its constants.

    Args:
        values: the dtype whose numbers the weights are rounded to; None: `dtype`.
    """

    def __init__(self, dtype: np.dtype, fault: Fault | None = None, values: np.dtype | None = None) -> None:
        self.dtype, self.fault, self.values = dtype, fault or Fault(), values or dtype
        self.constants: dict[str, np.ndarray] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._seed = 0

    def model(self) -> onnx.ModelProto:
        kind = ELEMENTS[self.dtype]
        cache = ["batch", KV_HEADS, LENGTH, WIDTH]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info("starts", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "rows", VOCAB])]
        for layer in range(LAYERS):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", kind, cache))
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", kind, cache))
        self._write()
        tensors = [initializer(name, value) for name, value in self.constants.items()]
        body = helper.make_graph(self._nodes, "decoder", inputs, outputs, tensors)
        return helper.make_model(body, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)

    def _write(self) -> None:
        mask, positions = self._positions()
        table = self._weight("embedding", VOCAB, HIDDEN, scale=1.0)
        x = self._op("Gather", table, "input_ids")
        for layer in range(LAYERS):
            attended = self._attention(layer, self._norm(x), positions, mask)
            x = self._op("Add", x, attended)
            x = self._op("Add", x, self._feed_forward(layer, self._norm(x)))
        x = self._op("Gather", self._norm(x), "rows", axis=1)
        logits = self._op("MatMul", x, self._op("Transpose", table, perm=[1, 0]))
        self._op("Cast", logits, to=TensorProto.FLOAT, output="logits")

    def _positions(self) -> tuple[str, str]:
        """Return the mask [B, 1, S, T] and the positions [B, S]."""
        tokens = self._op("Squeeze", self._op("Shape", "input_ids", start=1, end=2))
        offsets = self._op("Range", self._const(np.array(0)), tokens, self._const(np.array(1)))
        positions = self._op("Add", self._op("Unsqueeze", "starts", self._ints(1)), offsets)
        last = self._op("Add", self._op("Unsqueeze", positions, self._ints(2)), self._const(np.array(self.fault.mask)))
        seen = self._op("LessOrEqual", self._const(np.arange(LENGTH)), last)
        return self._op("Unsqueeze", seen, self._ints(1)), positions

    def _attention(self, layer: int, x: str, positions: str, mask: str) -> str:
        query = self._rope(self._heads(self._linear(f"q{layer}", x, HEADS * WIDTH), HEADS), positions)
        key = self._rope(self._heads(self._linear(f"k{layer}", x, KV_HEADS * WIDTH), KV_HEADS), positions)
        value = self._heads(self._linear(f"v{layer}", x, KV_HEADS * WIDTH), KV_HEADS)
        slots = self._op("Add", "starts", self._const(np.array(self.fault.slot)))
        caches = [
            self._op(
                "TensorScatter", f"past_key_values.{layer}.{part}", new, slots, axis=2, output=f"present.{layer}.{part}"
            )
            for part, new in (("key", key), ("value", value))
        ]
        if self.fault.swapped:
            caches.reverse()
        out = self._op("Attention", query, *caches, mask, scale=SCALE * self.fault.scale)
        out = self._op("Reshape", self._op("Transpose", out, perm=[0, 2, 1, 3]), self._ints(0, 0, HEADS * WIDTH))
        return self._linear(f"o{layer}", out, HIDDEN, HEADS * WIDTH)

    def _heads(self, x: str, heads: int) -> str:
        return self._op("Transpose", self._op("Reshape", x, self._ints(0, 0, heads, WIDTH)), perm=[0, 2, 1, 3])

    def _rope(self, x: str, positions: str) -> str:
        angles = np.outer(np.arange(LENGTH), 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH))
        cos, sin = (self._const(f(angles).astype(self.values).astype(self.dtype)) for f in (np.cos, np.sin))
        return self._op("RotaryEmbedding", x, cos, sin, positions)

    def _feed_forward(self, layer: int, x: str) -> str:
        gate, up = (self._linear(f"{name}{layer}", x, INNER) for name in ("gate", "up"))
        act = self._op("Mul", self._op("Mul", gate, self._op("Sigmoid", gate)), up)
        return self._linear(f"down{layer}", act, HIDDEN, INNER)

    def _norm(self, x: str) -> str:
        self._seed += 1
        gain = numbers(HIDDEN, seed=self._seed, low=0.5, high=1.5).astype(self.values).astype(self.dtype)
        return self._op("RMSNormalization", x, self._const(gain), axis=-1, epsilon=1e-5)

    def _linear(self, name: str, x: str, outputs: int, inputs: int = HIDDEN) -> str:
        weight = self._weight(name, outputs, inputs, scale=1.5 / np.sqrt(inputs))
        return self._op("MatMul", x, self._op("Transpose", weight, perm=[1, 0]))

    def _weight(self, name: str, outputs: int, inputs: int, scale: float) -> str:
        self._seed += 1
        value = np.random.default_rng(self._seed).normal(0, scale, (outputs, inputs))
        self.constants[name] = value.astype(np.float32).astype(self.values).astype(self.dtype)
        return name

    def _ints(self, *values: int) -> str:
        return self._const(np.array(values, np.int64))

    def _const(self, value: np.ndarray) -> str:
        name = f"const{len(self.constants)}"
        self.constants[name] = value
        return name

    def _op(self, kind: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{kind}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}.node", **attributes))
        return output


# Decoding -----------------------------------------------------------------------------------------------------------

IDS = np.array([[3, 17, 5, 29, 8, 11, 2, 36], [21, 4, 33, 9, 14, 1, 25, 6]])
# Token by token of each sequence: the prompts are of 5 and 3 tokens, then come two tokens at once, then single ones.
CALLS = (((0, 0), 5), ((5, 3), 2), ((7, 5), 1), ((8, 6), 1))


def decode(run: Runner, dtype: np.dtype) -> list[np.ndarray]:
    """Return the logits [B, R, V] of a prompt and of steps, in which each sequence is at a position of its own.

    The second prompt is shorter than the first: its padding is written to the cache, and overwritten later.
    """
    caches = {
        f"past_key_values.{layer}.{part}": np.zeros((2, KV_HEADS, LENGTH, WIDTH), dtype)
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    logits = []
    for starts, tokens in CALLS:
        ids = np.stack([np.take(row, range(s, s + tokens), mode="wrap") for row, s in zip(IDS, starts, strict=True)])
        feeds = {"input_ids": ids, "starts": np.array(starts), "rows": np.arange(tokens), **caches}
        found = run(feeds)
        logits.append(found["logits"])
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
    return logits
