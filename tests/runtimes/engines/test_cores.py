"""Physical cores on machines that are described by files in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmc.runtimes.engines.cores import physical_cores


def machine(folder: Path, siblings: dict[int, str], quota: str | None = None) -> tuple[Path, Path]:
    for cpu, shared in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{shared}\n")
    if quota is not None:
        (folder / "cpu.max").write_text(quota)
    return folder, folder / "cpu.max"


HYPERTHREADS = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}


@pytest.mark.parametrize(
    ("allowed", "quota", "want"),
    [
        (range(8), None, 4),  # two threads per core
        (range(8), "max 100000\n", 4),
        (range(8), "250000 100000\n", 3),  # CPU time of two and a half cores
        (range(8), "10000 100000\n", 1),
        (range(8), "1600000 100000\n", 4),
        (range(8), "nonsense", 4),
        ({1, 5}, None, 1),  # two threads of one core
        ({1, 2, 6}, None, 2),
    ],
)
def test_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], quota: str | None, want: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed), raising=False)
    assert physical_cores(*machine(tmp_path, HYPERTHREADS, quota)) == want


def test_without_topology_every_cpu_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert physical_cores(tmp_path, tmp_path / "none") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert physical_cores(tmp_path, tmp_path / "none") == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert physical_cores(tmp_path, tmp_path / "none") == 1


def test_this_machine() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
