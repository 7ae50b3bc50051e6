"""Tiny models on disk, and the command as a process of its own."""

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
    """A model that llmc refuses, in capture."""
    folder = tmp_path_factory.mktemp("mamba")
    tiny_model("mamba").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llmc() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `llmc` with arguments; environment variables by keyword."""

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
