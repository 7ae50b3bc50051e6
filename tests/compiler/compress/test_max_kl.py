"""`--max-kl`: the artifact measures under the limit, with no more bits than it needs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from compiled import speaking_model

import llmc
from llmc.compiler.cli.main import main
from llmc.compiler.compress.bit_allocation import Candidate
from llmc.compiler.compress.max_kl import keep_under
from llmc.compiler.compress.quantization import Quantization
from llmc.compiler.trials import Trials
from llmc.errors import LlmcError
from llmc.passes.quantize.quantization_plan import Choice, QuantizationPlan
from llmc.passes.quantize.schemes import Grid
from llmc.runtimes.artifact.manifest import MaxKlSpec


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure trials on 600 tokens."""
    monkeypatch.setattr("llmc.compiler.api.Trials", functools.partial(Trials, tokens=600))


def compiled(out: Path, **options: float) -> llmc.Artifact:
    return llmc.compile(speaking_model(), out, quantize="int4", calib_samples=4, calib_length=60, **options)


def measured(out: Path) -> float:
    """By a fresh `llmc eval`."""
    given = ["eval", str(out), "--reference", str(speaking_model()), "--max-tokens", "600", "--json"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    return float(json.loads(result.stdout)["kld"]["mean"])


def raised(made: llmc.Artifact) -> int:
    assert made.manifest.quantization is not None
    return made.manifest.quantization.weights.get("int8 by channel", 0)


@pytest.mark.usefixtures("few_tokens")
def test_under_the_limit_with_few_raised(tmp_path: Path) -> None:
    coarse, fine = (compiled(tmp_path / name, raise_share=share) for name, share in (("coarse", 0.0), ("fine", 1.0)))
    between = (measured(tmp_path / "coarse") + measured(tmp_path / "fine")) / 2
    made = compiled(tmp_path / "out", max_kl=between)
    assert raised(coarse) < raised(made) < raised(fine)
    assert measured(tmp_path / "out") < between
    assert made.manifest.quantization is not None and made.manifest.quantization.max_kl is not None
    assert made.manifest.quantization.max_kl.limit == between
    assert made.manifest.quantization.max_kl.tokens == 600


@pytest.mark.usefixtures("few_tokens")
def test_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="MAX_KL_UNREACHED") as caught:
        compiled(tmp_path / "out", max_kl=1e-9)
    assert "1e-09" in caught.value.what and not (tmp_path / "out").exists()


# Without artifacts --------------------------------------------------------------------------------------------------

NAMES = [f"w{i}" for i in range(20)]


def quantization() -> Quantization:
    """Weights in 4 bits that could have more, each with half the loss of the one before."""
    return Quantization(
        QuantizationPlan("int4", {name: Choice(Grid("int4", 16), "linear", 16) for name in NAMES}, (16,)),
        "gptq",
        promoted=Grid("int8"),
        candidates=tuple(Candidate(name, 0.5**i, 10) for i, name in enumerate(NAMES)),
        input_channels=dict.fromkeys(NAMES, 64),
    )


def divergence(one: Quantization) -> float:
    return sum(candidate.loss for candidate in one.candidates if candidate.name not in one.raised)


def test_the_most_sensitive_weights_get_more_bits_until_the_limit_is_kept() -> None:
    tried: list[Quantization] = []

    def measure(one: Quantization) -> float:
        tried.append(one)
        return divergence(one)

    found = keep_under(0.3, quantization(), measure, 700)
    assert found.raised == {"w0", "w1", "w2"}, "0.25 is left, and 0.5 would be without w2"
    assert found.max_kl == MaxKlSpec(limit=0.3, measured=divergence(found), tokens=700, trials=len(tried))
    assert found.spec().max_kl == found.max_kl
    assert found.spec().weights == {"int4 in groups of 16": 17, "int8 by channel": 3}
    assert all(one.max_kl is None and one.plan is found.plan for one in tried)


def test_a_limit_that_more_bits_for_all_do_not_keep() -> None:
    with pytest.raises(LlmcError, match=r"above the limit 0\.001") as caught:
        keep_under(0.001, quantization(), lambda one: 0.01 + divergence(one), 700)
    assert caught.value.code == "MAX_KL_UNREACHED" and "0.01 nats" in caught.value.what
