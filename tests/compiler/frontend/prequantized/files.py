"""Quantized checkpoints of a tiny llama, packed by each format's definition."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import llmc
from llmc.compiler.frontend.sources import find_source
from llmc.ir.stored import stored_codes, why_dequantized
from llmc.ir.weights import Weight
from llmc.kernels.ops.quantized import dequantize

Values = list[list[np.float32]]
Linear = tuple[dict[str, Tensor], Values]
# Makes a linear's tensors for O output and I input channels, by name ending, and their dequantized values.
Make = Callable[[int, int, random.Random], Linear]


def tiny_llama(hidden: int = 32, inner: int = 96) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def write(
    folder: Path,
    make: Make,
    quantization: dict[str, Any],
    skip: Sequence[str] = ("lm_head",),
    model: PreTrainedModel | None = None,
) -> dict[str, Tensor]:
    """Write a quantized checkpoint and return the dequantized values by weight name.

    Linears whose name ends with an entry of `skip` are not quantized.
    """
    model = model or tiny_llama()
    rng = random.Random(5)
    tensors, expected = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(tuple(skip)):
            parts, values = make(module.out_features, module.in_features, rng)
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            expected[f"{name}.weight"] = torch.from_numpy(np.array(values, np.float32))
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return expected


def weights_of(folder: Path) -> dict[str, Weight]:
    source = find_source(folder)
    return dict(source.weights(source.build(torch.float32)))


def check(folder: Path, expected: dict[str, Tensor], scheme: str, group_size: int | None = None) -> None:
    """Check that values are exact, and that the stored codes are usable.

    The codes dequantize to the same values, and the model's logits agree.
    """
    weights = weights_of(folder)
    for name, want in expected.items():
        assert weights[name].dtype == torch.float32 and weights[name].shape == tuple(want.shape)
        assert torch.equal(weights[name].evaluate(), want), name
        stored = stored_codes(weights[name])
        assert stored is not None and why_dequantized(weights[name]) is None
        assert stored.scheme == scheme and stored.group_size == (group_size or want.shape[1])
        zeros = None if stored.zeros is None else stored.zeros.evaluate()
        if zeros is not None:
            assert zeros.dtype == stored.codes.evaluate().dtype and zeros.shape == stored.scales.shape
        again = dequantize(stored.codes.evaluate(), stored.scales.evaluate(), zeros, scheme, stored.group_size)
        assert torch.equal(again, want), name
    check_model(folder, expected)


def check_dequantized(folder: Path, expected: dict[str, Tensor], reason: str) -> None:
    """Check that values are exact, and that the codes are unusable for a reason."""
    weights = weights_of(folder)
    for name, want in expected.items():
        assert torch.equal(weights[name].evaluate(), want), name
        assert stored_codes(weights[name]) is None and reason in (why_dequantized(weights[name]) or "")
    check_model(folder, expected)


def check_model(folder: Path, expected: dict[str, Tensor]) -> None:
    config = find_source(folder).config
    model = tiny_llama(config.hidden_size, config.intermediate_size)
    assert set(expected) < set(model.state_dict())
    model.load_state_dict(model.state_dict() | expected)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).repeat(2, 1)
    with torch.no_grad():
        want = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    atol = 1e-5 * max(1.0, float(want.abs().max()))  # an LM head of random codes gives large logits
    torch.testing.assert_close(llmc.capture(folder)(tokens, positions), want, atol=atol, rtol=0)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refusal(folder: Path) -> llmc.LlmcError:
    """Return the error of opening the checkpoint, which must be one paragraph."""
    with pytest.raises(llmc.LlmcError) as caught:
        weights_of(folder)
    error = caught.value
    assert "\n" not in str(error) and error.what.endswith(".") and error.hint.endswith(".")
    return error


def check_damage(folder: Path, part: str) -> None:
    """Check that the error names the tensor if it is missing and if it is too short."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    name = f"model.layers.0.mlp.up_proj.{part}"
    change(folder, lambda tensors: tensors.pop(name))
    error = refusal(folder)
    assert error.code == "WEIGHTS_MISSING" and name in error.what
    path.write_bytes(raw)

    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    if load_file(path)[name].ndim:
        change(folder, shorten)
        error = refusal(folder)
        assert error.code == "WEIGHTS_MISMATCH" and name in error.what
        path.write_bytes(raw)


def word(fields: Sequence[int], bits: int) -> int:
    """Pack fields into a 32-bit word, the first field in the lowest bits."""
    total = 0
    for index, value in enumerate(fields):
        assert 0 <= value < 1 << bits
        total += value << (bits * index)
    return total


def int32(words: Sequence[Sequence[int]]) -> Tensor:
    """Convert unsigned 32-bit words to the int32 tensor of a checkpoint."""
    return torch.from_numpy(np.array([[w % 2**32 for w in line] for line in words], np.uint32).view(np.int32).copy())


def half(rng: random.Random) -> np.float16:
    return np.float16(rng.uniform(0.01, 0.2))


def value(code: int, zero: int, scale: Any) -> np.float32:
    return np.float32(code - zero) * np.float32(scale)
