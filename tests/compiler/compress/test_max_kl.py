"""`--max-kl`: what is delivered measures under the limit, and costs no more than it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from compiled import speaking_model

import llmc
from llmc.compiler.cli.main import main
from llmc.errors import LlmcError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.compiler.compress.max_kl.TOKENS", 600)


def compiled(out: Path, **options: float) -> llmc.compiler.api.Artifact:  # type: ignore[name-defined]
    return llmc.compile(speaking_model(), out, quantize="int4", calib_samples=4, calib_length=60, **options)


def measured(out: Path) -> float:
    """By a fresh `llmc eval`."""
    given = ["eval", str(out), "--reference", str(speaking_model()), "--max-tokens", "600", "--json"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    return float(json.loads(result.stdout)["kld"]["mean"])


def raised(made: llmc.compiler.api.Artifact) -> int:  # type: ignore[name-defined]
    return int(made.manifest.quantization["weights"].get("int8 by channel", 0))  # type: ignore[index]


def test_under_the_limit_with_few_raised(tmp_path: Path) -> None:
    coarse, fine = (compiled(tmp_path / name, raise_share=share) for name, share in (("coarse", 0.0), ("fine", 1.0)))
    between = (measured(tmp_path / "coarse") + measured(tmp_path / "fine")) / 2
    made = compiled(tmp_path / "out", max_kl=between)
    assert raised(coarse) < raised(made) < raised(fine)
    assert measured(tmp_path / "out") < between
    assert made.manifest.quantization is not None and made.manifest.quantization["max_kl"]["limit"] == between


def test_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="MAX_KL_UNREACHED") as caught:
        compiled(tmp_path / "out", max_kl=1e-9)
    assert "1e-09" in caught.value.what and not (tmp_path / "out").exists()
