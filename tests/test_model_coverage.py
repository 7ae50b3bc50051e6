"""A third of transformers' causal language models, chosen to cover every feature.

`make coverage` runs all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from model_coverage import LIMIT, MAX_SEQ_LEN, REFUSALS, cover, difference
from torch import fx
from zoo.tiny import tiny_model, tiny_model_types

import llmc
from llmc.ir.weights import constant, fold
from llmc.kernels.ops import attention, layer_norm, rms_norm, rope
from llmc.passes.queries import arguments, is_op

THIRD = """
afmoe apertus aria_text bart bert bloom cohere cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge falcon
gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj
granite granite_swa helium hunyuan_v1_moe jamba jetmoe lfm2 llama llama4_text longcat_flash mamba mimo_v2_flash
minicpm3 mistral mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmoe opt phi phi3 phimoe qwen2
qwen2_moe qwen3 mamba2 recurrent_gemma roberta rwkv smollm3 stablelm starcoder2 whisper xglm
""".split()

# Ops that canonical programs of these families must not contain, because the dialect's ops replace them.
RAW = {
    f"aten.{name}"
    for name in "rsqrt mean pow sin cos silu gelu sigmoid tanh layer_norm rms_norm linear embedding "
    "scaled_dot_product_attention bmm matmul neg view_as_complex addmm".split()
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt", "mixtral", "gpt_oss", "deepseek_v3"]
# Exceptions without an op in the dialect: gates that score experts, and MLPs without a gate.
ALLOWED = {"deepseek_v3": {"aten.sigmoid"}, "gpt_neox": {"aten.gelu"}}


@pytest.mark.parametrize("model_type", THIRD)
def test_a_type_equals_eager_or_is_refused_with_a_reason(model_type: str) -> None:
    outcome = cover(model_type)
    if outcome.error is None:
        assert outcome.code in REFUSALS, outcome
        assert outcome.reason
        assert f"| {model_type} | refused |" in _page(), "docs/coverage.md lists it as captured"
    else:
        assert outcome.error <= LIMIT


def test_the_page_lists_every_type_and_at_least_120_are_captured() -> None:
    cells = [line.split("|")[1:3] for line in _page().splitlines() if line.startswith("| ")][1:]
    status = {name.strip(): state.strip() for name, state in cells}
    # An older transformers than the page's has fewer types. A newer one has types that `make coverage` will add.
    if _numbers(transformers.__version__) <= _numbers(_page().partition("transformers ")[2].split(",")[0]):
        assert set(tiny_model_types()) <= set(status)
    assert sum(state != "refused" for state in status.values()) >= 120
    refusals = [line.split("`")[1] for line in _page().splitlines() if "| refused |" in line]
    assert set(refusals) <= REFUSALS, "an internal error is not a refusal"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _page() -> str:
    return (Path(llmc.__file__).parent / "docs" / "coverage.md").read_text()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_canonical_programs_have_no_ops_that_the_dialect_replaces(model_type: str) -> None:
    ops = llmc.capture(tiny_model(model_type), max_seq_len=MAX_SEQ_LEN).ops()
    assert not (RAW - ALLOWED.get(model_type, set())) & set(ops)
    assert ops["llmc.attention"] == 2 or model_type in ("gemma3_text",)


def _change(op: object, name: str, to: Callable[[object], object]) -> Callable[[llmc.Program], None]:
    """Return a function that changes an argument in every call of an op that has one."""

    def plant(program: llmc.Program) -> None:
        for node in program.nodes:
            if is_op(node, op) and (call := arguments(node))[name] is not None:  # type: ignore[arg-type]
                node.args, node.kwargs = (), {**call, name: to(call[name])}

    return plant


def _change_weight(op: object, name: str) -> Callable[[llmc.Program], None]:
    def plant(program: llmc.Program) -> None:
        for node in program.nodes:
            if is_op(node, op) and isinstance(weight := arguments(node)[name], fx.Node):  # type: ignore[arg-type]
                program.weights[str(weight.target)] = fold(program.weights[str(weight.target)], 1.05)

    return plant


def _other_theta(program: llmc.Program) -> None:
    """Change the first rope's tables to those of another base.

    All angles change, except the first of each position.
    """
    for node in program.nodes:
        if is_op(node, rope):
            cos, sin = (str(arguments(node)[name].target) for name in ("cos", "sin"))
            angles = torch.atan2(program.weights[sin].evaluate(), program.weights[cos].evaluate())
            channels = angles.shape[1]
            angles = angles * 1.1 ** (torch.arange(channels) / channels)
            program.weights[cos], program.weights[sin] = constant(angles.cos(), "cos"), constant(angles.sin(), "sin")
            return


PLANTED = [
    ("mistral", _change(attention, "window", lambda w: w + 1)),
    ("mistral", _change(attention, "window", lambda w: None)),
    ("llama4_text", _change(attention, "chunk", lambda c: c + 1)),
    ("llama", _change(attention, "scale", lambda s: s * 1.02)),
    ("llama", _change(rms_norm, "eps", lambda e: e * 1.1)),
    ("opt", _change(layer_norm, "eps", lambda e: e + 1e-3)),
    ("gemma2", _change(attention, "softcap", lambda c: c * 1.05)),
    ("gemma2", _change(attention, "softcap", lambda c: None)),
    ("llama", _other_theta),
    ("gpt_oss", _change(attention, "sinks", lambda s: None)),
    ("gpt_oss", _change_weight(attention, "sinks")),
    ("bloom", _change_weight(attention, "slopes")),
]


@pytest.mark.parametrize(("model_type", "plant"), PLANTED)
def test_a_planted_error_is_detected(model_type: str, plant: Callable[[llmc.Program], None]) -> None:
    model = tiny_model(model_type)
    program = llmc.capture(model, max_seq_len=MAX_SEQ_LEN)
    assert difference(program, model) <= LIMIT
    plant(program)
    assert difference(program, model) > LIMIT
