"""Fixtures: tiny models on disk, and `llmc` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from zoo.tiny import tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that capture refuses."""
    folder = tmp_path_factory.mktemp("mamba")
    tiny_model("mamba").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llmc() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `llmc`; keywords set environment variables."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "from llmc.compiler.cli.main import main; main(prog_name='llmc')",
                *map(str, arguments),
            ],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )

    return run
