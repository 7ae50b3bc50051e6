"""Capture of plain modules, refusals, and the order of export attempts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.tiny import tiny_model

from llmc import LlmcError
from llmc.compiler.frontend.capture import trace
from llmc.compiler.frontend.skeleton import parameters_on_meta
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import constant

VOCAB = 11


class Plain(nn.Module):
    """An embedding, a linear and an LM head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(4), persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.embed(tokens)) + self.shift)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


class Positional(Plain):
    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.hidden(tokens) * torch.cos(positions)[..., None])


class Loops(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hidden(tokens)
        state = torch.zeros_like(x[:, 0])
        states = []
        for step in range(tokens.shape[1]):
            state = torch.tanh(state + x[:, step])
            states.append(state)
        return self.head(torch.stack(states, 1))


class ZeroIfPositive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.zero_() if x.sum() > 0 else x


class Branches(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.branch = ZeroIfPositive()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.branch(self.hidden(tokens)))


class Selects(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hidden(tokens)
        for _ in tokens.flatten().nonzero():
            x = x * 2
        return self.head(x)


class Raises(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        raise OSError("no such thing")


class BranchesOnLength(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * (2.0 if tokens.shape[1] > 6 else 1.0)


class BranchesOnLongLength(Plain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * (2.0 if tokens.shape[1] > 30 else 1.0)


def assert_equal(program: Program, model: nn.Module, *sizes: tuple[int, int]) -> None:
    for batch, length in sizes:
        tokens = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(length).expand(batch, -1)
        want = model(tokens, positions) if isinstance(model, Positional) else model(tokens)
        torch.testing.assert_close(program(tokens, positions), want)


@pytest.mark.parametrize("kind", [Plain, Positional])
def test_a_plain_module_is_captured(kind: type[Plain]) -> None:
    model = kind()
    program = trace(model, {}, "model", 32)
    assert program.stage is Stage.CAPTURED
    assert len(program.inputs) == 2
    assert_equal(program, model, (2, 9), (1, 1))


def test_tied_parameters_become_one_weight() -> None:
    program = trace(Plain(), {}, "model", 32)
    assert sorted(program.weights) == ["embed.weight", "inner.bias", "inner.weight", "shift"]


def test_given_weights_supply_the_values_of_meta_parameters() -> None:
    model = Plain()
    with parameters_on_meta():
        empty = Plain()
    empty.head.weight = empty.embed.weight
    empty.shift = model.shift
    # A checkpoint may contain either name of a tied parameter.
    weights = {name: constant(p, name) for name, p in model.named_parameters() if name != "embed.weight"}
    weights["head.weight"] = constant(model.head.weight, "head.weight")
    assert_equal(trace(empty, weights, "model", 32), model, (2, 9))


@pytest.mark.parametrize(
    ("kind", "code", "detail"),
    [
        (Loops, "CAPTURE_SPECIALIZED", "in forward (test_capture.py:"),
        (Branches, "CAPTURE_DATA_DEPENDENT", "in ZeroIfPositive"),
        (Selects, "CAPTURE_DATA_DEPENDENT", "Selects"),
        (Raises, "CAPTURE_FAILED", "no such thing"),
        (BranchesOnLength, "CAPTURE_SPECIALIZED", "7 or more"),
        (BranchesOnLongLength, "CAPTURE_SPECIALIZED", "2 to 30"),
    ],
)
def test_a_refusal_names_the_reason_and_the_place(
    kind: type[Plain], code: str, detail: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LlmcError) as refused:
        trace(kind(), {}, kind.__name__, 32)
    assert refused.value.code == code
    assert detail in refused.value.what
    assert "\n" not in str(refused.value)
    assert len(refused.value.what) < 400
    out, err = capfd.readouterr()
    assert not out and not err


def test_a_forward_of_three_tensors_is_refused() -> None:
    class Three(Plain):
        def forward(self, tokens: Tensor, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens)

    with pytest.raises(LlmcError) as refused:
        trace(Three(), {}, "model", 32)
    assert refused.value.code == "FORWARD_UNKNOWN"


def test_attention_outside_the_registry_is_captured_as_plain_ops() -> None:
    model = tiny_model("bloom")
    program = trace(model, {}, "bloom", 64)
    assert program.ops()["aten.softmax"] and not program.ops()["llmc.attention"]
    tokens, positions = torch.randint(3, 70, (2, 12)), torch.arange(12).expand(2, -1)
    want = model(input_ids=tokens, position_ids=positions).logits
    torch.testing.assert_close(program(tokens, positions), want)


def test_attempts_are_made_in_order_and_the_first_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*_: Any, strict: bool, **__: Any) -> None:
        tried.append((model.config._attn_implementation, strict))
        raise ValueError(f"reason {len(tried)}")

    model = tiny_model("llama")
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(LlmcError, match="reason 1"):
        trace(model, {}, "llama", 64)
    assert tried == [("llmc", False), ("eager", False), ("llmc", True)]


def test_an_error_about_the_hooked_mask_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*_: Any, strict: bool, **__: Any) -> None:
        tried.append((model.config._attn_implementation, strict))
        raise ValueError("reason" if model.config._attn_implementation == "eager" else "'MaskRule' has no dtype")

    model = tiny_model("llama")
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(LlmcError, match=r"ValueError: reason"):
        trace(model, {}, "llama", 64)
    assert tried == [("llmc", False), ("eager", False)]


@pytest.mark.parametrize("code", ["MASK_UNKNOWN", "EXPERTS_UNKNOWN"])
def test_an_error_that_no_other_attempt_avoids_is_final(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    tried = []

    def fail(*_: Any, strict: bool, **__: Any) -> None:
        tried.append(strict)
        raise LlmcError(code, "unsupported")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(LlmcError, match=code):
        trace(tiny_model("llama"), {}, "llama", 64)
    assert tried == [False]
