"""References of models, against transformers by hand, and the files that they are kept in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import forward
from compiled import artifact, speaking_model
from transformers import AutoModelForCausalLM

from llmc import LlmcError
from llmc.compiler.frontend import eager
from llmc.compiler.gate import reference_logits
from llmc.compiler.gate.reference_logits import StoredReference, reference_of
from llmc.ir.weights import Leaf, constant
from llmc.runtimes.engines.load import load
from llmc.runtimes.generate.tokenizer import Tokenizer
from llmc.runtimes.measure.evaluate import evaluate
from llmc.runtimes.measure.windows import Window, cut_windows

TEXT = "The quick brown fox jumps over the lazy dog, again and again; 1234567890 times. " * 3
WINDOW, STRIDE = 48, 20


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return Tokenizer(speaking_model()).encode(TEXT)


@pytest.fixture(scope="module")
def windows(tokens: list[int]) -> list[Window]:
    return cut_windows(tokens, 2048, WINDOW, STRIDE)


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(speaking_model(), dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    return tmp_path / "references"


def reference(windows: list[Window], **options: Any) -> StoredReference:
    return reference_of(str(speaking_model()), windows, width(), **options)


def width() -> int:
    return int(json.loads((speaking_model() / "config.json").read_text())["vocab_size"])


def test_perplexity_and_divergence_are_those_of_transformers(
    tokens: list[int], windows: list[Window], plain: Any
) -> None:
    engine = load(artifact("speaking", quantize="int4"))
    found = evaluate(engine, windows, reference(windows))

    ids, own, theirs, truth = torch.tensor([tokens]), [], [], []
    last_end = 0
    for begin in range(0, len(tokens), STRIDE):
        end = min(begin + WINDOW, len(tokens))
        piece, fresh = ids[:, begin:end], end - max(last_end, 1)
        with torch.no_grad():
            theirs.append(plain(piece).logits[0, :-1][-fresh:].double().log_softmax(1))
        got = torch.from_numpy(forward(engine, piece.numpy(), np.zeros(1, np.int64)))
        own.append(got[0, :-1][-fresh:].double().log_softmax(1))
        truth.append(piece[0, -fresh:])
        last_end = end
        if end == len(tokens):
            break
    ours, model, targets = torch.cat(own), torch.cat(theirs), torch.cat(truth)
    assert targets.tolist() == tokens[1:]

    nll = torch.nn.functional.nll_loss(ours, targets).item()
    model_nll = torch.nn.functional.nll_loss(model, targets).item()
    kld = torch.nn.functional.kl_div(ours, model, reduction="none", log_target=True).sum(1)
    assert kld.mean() > 1e-3
    assert found.perplexity.value == pytest.approx(np.exp(nll), rel=1e-5)
    assert found.ratio and found.ratio.value == pytest.approx(np.exp(nll - model_nll), rel=1e-5)
    assert found.kld and found.kld.mean == pytest.approx(kld.mean().item(), abs=1e-5)
    assert np.allclose(found.scores.kld, kld.numpy(), rtol=3e-3, atol=1e-6)
    same = (ours.argmax(1) == model.argmax(1)).double().mean().item()
    assert found.same_top1 and found.same_top1.value == pytest.approx(same)


def test_an_unquantized_artifact_is_at_the_floor_of_float16(windows: list[Window]) -> None:
    found = evaluate(load(artifact("speaking")), windows, reference(windows))
    assert found.kld and found.kld.max < 1e-6
    assert found.ratio and abs(found.ratio.value - 1) < 1e-6
    assert found.same_top1 and found.same_top1.value == 1


def test_what_float16_costs() -> None:
    """Peaked and flat distributions of many tokens, against others near to them and far."""
    random = np.random.default_rng(0)
    for spread in (0.5, 2, 5, 10):
        logits = random.normal(scale=spread, size=(64, 50_000)).astype(np.float32)
        wide = reference_logits.log_softmax(logits)
        kept = reference_logits.log_softmax((logits - logits.max(1, keepdims=True)).astype(np.float16))
        assert (np.exp(wide) * (wide - kept)).sum(1).max() < 1e-6
        for distance in (0.01, 0.3):
            other = reference_logits.log_softmax(logits + random.normal(scale=distance, size=logits.shape))
            exact, got = ((np.exp(p) * (p - other)).sum(1).mean() for p in (wide, kept))
            assert abs(got - exact) < 1e-6 + 5e-4 * exact, (spread, distance)


def test_it_is_computed_once(windows: list[Window], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    first = reference(windows, watch=lambda *step: told.append(step))
    assert told == [("reference", 0, 0), *(("reference", i, len(windows)) for i in range(len(windows)))]
    monkeypatch.setattr(eager, "eager_logits", None)
    again = reference(windows)
    assert again.path == first.path and list(cache.iterdir()) == [first.path]
    assert first.path.stat().st_size == 512 + (len(TEXT) - 1) * (2 * width() + 8)
    for i in range(len(windows)):
        for one, other in zip(first.window(i), again.window(i), strict=True):
            assert len(one) == len(windows[i].targets) and np.array_equal(one, other)
    with pytest.raises(TypeError):
        reference(windows[1:])


@pytest.mark.parametrize("harm", ["cut", "grow", "header", "rows", "end", "empty"])
def test_a_damaged_file_is_made_again(windows: list[Window], harm: str) -> None:
    path = reference(windows[:2]).path
    good = path.read_bytes()
    bad = bytearray(good)
    place = {"header": good.index(b'"tokens": ') + 10, "rows": 600, "end": len(good) - 3}.get(harm)
    if place:
        bad[place] ^= 1
    path.write_bytes({"cut": good[:-8], "grow": good + bytes(8), "empty": b""}.get(harm, bytes(bad)))
    assert path.read_bytes() != good
    assert reference(windows[:2]).path.read_bytes() == good


def test_another_model_is_another_file(windows: list[Window], tmp_path: Path) -> None:
    other = shutil.copytree(speaking_model(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    one, two = reference(windows[:1]), reference_of(str(other), windows[:1], width())
    assert one.path != two.path
    assert not np.array_equal(one.window(0)[0], two.window(0)[0])


def test_other_tokens_of_the_same_number_are_another_file() -> None:
    one, two = ([Window(np.array([5, 6, last]), first)] for last, first in ((7, 1), (8, 1)))
    three = [Window(np.array([5, 6, 7]), 2), Window(np.array([5, 6, 7]), 2)]
    assert len({reference(some).path for some in (one, two, three)}) == 3


def test_an_interruption_leaves_nothing(windows: list[Window], cache: Path) -> None:
    def watch(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference(windows, watch=watch)
    assert list(cache.iterdir()) == []


def test_a_model_of_another_vocabulary(windows: list[Window], cache: Path) -> None:
    with pytest.raises(LlmcError, match=f"REFERENCE_MISMATCH.*predicts {width()} tokens, the artifact 7"):
        reference_of(str(speaking_model()), windows, 7)
    beyond = [Window(np.array([1, width()]), 1)]
    with pytest.raises(LlmcError, match=f"REFERENCE_MISMATCH.*knows {width()} tokens.*number {width()}"):
        reference_of(str(speaking_model()), beyond, width())
    assert list(cache.iterdir()) == []


def test_a_disk_without_room(windows: list[Window], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_logits.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(LlmcError, match=r"REFERENCE_DISK.*LLMC_CACHE"):
        reference(windows)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    with pytest.raises(LlmcError, match=r"REFERENCE_DISK.*can't be made"):
        reference(windows)


@pytest.mark.parametrize(
    ("system", "reads"), [("MemAvailable: 999999 kB", 1), ("MemAvailable: 2 kB", 2), ("MemFree: 999999 kB", 2), ("", 2)]
)
def test_weights_are_kept_as_far_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, reads: int
) -> None:
    """Half of the available memory is used. A system that doesn't tell how much that is has no room."""
    count = 0
    weight = constant(torch.arange(300.0), "w")
    assert isinstance(weight, Leaf)

    class Counted(Leaf):
        def evaluate(self) -> torch.Tensor:
            nonlocal count
            count += 1
            return super().evaluate()

    if system:
        (tmp_path / "meminfo").write_text(f"MemTotal: 999999 kB\n{system}\n")
    monkeypatch.setattr(reference_logits, "Path", {"/proc/meminfo": tmp_path / "meminfo"}.__getitem__)
    kept = reference_logits.keep_in_memory({"w": Counted(weight.source)})
    values = [kept["w"].evaluate() for _ in range(2)]
    assert count == reads
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], torch.arange(300.0))
