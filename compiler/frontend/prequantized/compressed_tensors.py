"""Reader of compressed-tensors checkpoints: packed integers, plain int8, and fp8.

    weight_packed       int32 [O, I * bits/32]     codes of consecutive input channels in one word, lowest bits first;
                                                   unsigned: the signed code plus half its range
    weight_shape        int64 [2]                  O and I; the last word of an output channel may be partly unused
    weight              int8 or float8 [O, I]      instead of weight_packed and weight_shape
    weight_scale        float [1], [O, 1], [O, groups], or one per block
    weight_zero_point   same shape as weight_scale; for packed codes int32, packed along the output channels
    weight_g_idx        int32 [I]                  the group of each input channel

A scheme's settings for quantized inputs are ignored: inputs are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....ir.weights import Weight, transpose
from .fp8_blocks import FP8, blocks, is_block
from .groups import from_groups
from .layout import expression, fields, raw_bytes, signed, wide
from .parts import FLOATS, Format, Parts, entry, unreadable

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_SUPPORTED = "llmc reads " + ", ".join(_FORMATS)
_MARKS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class _Scheme:
    """Quantization of the weights of some linears, one entry of `config_groups`."""

    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, ...]

    def fits(self, kind: str, scales: tuple[int, ...], outputs: int, inputs: int) -> bool:
        """True if codes of this kind and scales of this shape agree with the scheme."""
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {
            "tensor": ((), (1,), (1, 1)),
            "channel": ((outputs, 1), (outputs,)),
            "group": ((outputs, -(-inputs // self.group_size)),),
            "block": (tuple(-(-size // n) for size, n in zip((outputs, inputs), self.block, strict=False)),),
        }
        return kind == self.kind and scales in shapes[self.strategy]


def open_compressed_tensors(config: Mapping[str, Any]) -> Format:
    """Return the reader for a `quantization_config` of compressed-tensors."""
    groups: dict[str, Any] = entry(config, "config_groups", None, dict)
    if not all(isinstance(group, dict) for group in groups.values()):
        raise unreadable(f"The quantization_config's config_groups are presets, not schemes: {sorted(groups)}.")
    for form in (config.get("format"), *(group.get("format") for group in groups.values())):
        if form is not None and form not in _FORMATS:
            raise unreadable(f"The checkpoint's compressed-tensors have the format {form!r}; {_SUPPORTED}.")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise unreadable(f"The checkpoint's compressed-tensors are sparse, with the format {sparsity!r}.")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise unreadable("The checkpoint's compressed-tensors need a transform of the activations when the model runs.")
    schemes = [_scheme(group["weights"]) for group in groups.values() if group.get("weights")]
    return Format("compressed-tensors", _MARKS, ("weight",), lambda parts: _read(parts, schemes))


def _scheme(config: Mapping[str, Any]) -> _Scheme:
    kind, bits = config.get("type", "int"), entry(config, "num_bits", 8, int)
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise unreadable(f"The checkpoint's compressed-tensors have the type {kind!r} in {bits} bits.")
    group_size, block = config.get("group_size") or -1, config.get("block_structure") or ()
    strategy = config.get("strategy") or ("tensor" if config.get("group_size") is None else "group")
    if strategy == "group" and group_size == -1:
        strategy = "channel"
    if strategy not in _STRATEGIES or (strategy == "block" and not (kind == "float" and is_block(block))):
        raise unreadable(
            f"The checkpoint's compressed-tensors have scales per {strategy!r} of size {block or group_size}."
        )
    if strategy == "group" and not (isinstance(group_size, int) and group_size > 0):
        raise unreadable(f"The quantization_config's group_size is {group_size!r}.")
    return _Scheme(kind, bits, entry(config, "symmetric", True, bool), strategy, group_size, tuple(block))


def _read(parts: Parts, schemes: list[_Scheme]) -> Weight:
    if "weight_packed" in parts:
        packed = parts.matrix("weight_packed", (torch.int32,))
        outputs, inputs = (int(n) for n in parts.need("weight_shape", (2,)).evaluate())
        schemes = [s for s in schemes if packed.shape == (outputs, -(-inputs * s.bits // 32))]
        if not schemes or inputs % 2:
            raise parts.mismatch("weight_packed", f"{packed.shape} words can't store a {outputs} x {inputs} matrix")
        scheme = _choose(parts, schemes, "int", outputs, inputs)
        codes = expression(lambda x: x[:, : inputs * scheme.bits // 8], raw_bytes(packed))
        name = f"int{scheme.bits}"
        codes = signed(codes) if scheme.bits == 8 else codes
    else:
        codes = weight = parts.matrix("weight", (torch.int8, *FP8))
        outputs, inputs = weight.shape
        scheme = _choose(parts, schemes, "int" if weight.dtype == torch.int8 else "float", outputs, inputs)
        if scheme.strategy == "block":
            return blocks(parts, weight, "weight_scale", scheme.block)
        name = "int8" if scheme.kind == "int" else "fp8"
    scales = _by_output(wide(parts.need("weight_scale", dtypes=FLOATS)), outputs)
    zeros = None if scheme.symmetric else _zeros(parts, scheme, outputs, scales.shape[1])
    group_size = scheme.group_size if scheme.strategy == "group" else inputs
    return from_groups(parts, codes, scales, zeros, name, group_size, order="weight_g_idx")


def _choose(parts: Parts, schemes: list[_Scheme], kind: str, outputs: int, inputs: int) -> _Scheme:
    """Choose the config's one scheme that agrees with the linear's tensors.

    The scheme's `targets` are not read.
    """
    shape = parts.need("weight_scale").shape
    candidates = {scheme for scheme in schemes if scheme.fits(kind, shape, outputs, inputs)}
    if len(candidates) > 1:
        candidates = {scheme for scheme in candidates if scheme.symmetric == ("weight_zero_point" not in parts)}
    if len(candidates) != 1:
        count = "several schemes" if candidates else "no scheme"
        what = f"its shape is {shape}, which fits {count} of the quantization_config for {outputs} x {inputs} weights"
        raise parts.mismatch("weight_scale", what)
    return candidates.pop()


def _zeros(parts: Parts, scheme: _Scheme, outputs: int, groups: int) -> Weight:
    if "weight_packed" not in parts:
        shape = parts.need("weight_scale").shape
        return _by_output(parts.need("weight_zero_point", shape, (torch.int8,)), outputs)
    words = parts.need("weight_zero_point", (-(-outputs * scheme.bits // 32), groups), (torch.int32,))
    zeros = fields(raw_bytes(transpose(words)), scheme.bits)
    zeros = transpose(expression(lambda x: x[:, :outputs], zeros))
    return signed(zeros) if scheme.bits == 8 else zeros


def _by_output(weight: Weight, outputs: int) -> Weight:
    """Expand values per tensor, per output channel or per group to [O, groups]."""
    groups = max(1, weight.numel // outputs)
    return expression(lambda x: x.reshape(-1, groups).expand(outputs, groups), weight)
