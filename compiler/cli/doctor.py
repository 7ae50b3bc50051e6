"""`llmc doctor`: show versions, devices, and what each target can do on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from . import console
from .command import CHECK_FAILED, Verb, json_option, print_json

if TYPE_CHECKING:
    from ..inspect.doctor import MachineReport


@click.command(cls=Verb, short_help="Show versions, devices, and what each target can do on this machine.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show versions, devices, and what each target can do on this machine.

    Exit status 1 if a package that capture needs is missing or has an unsupported version.
    """
    from ..inspect.doctor import examine

    report = examine()
    if as_json:
        print_json(asdict(report) | {"healthy": report.healthy})
    else:
        _show(report)
    if not report.healthy:
        ctx.exit(CHECK_FAILED)


def _show(report: MachineReport) -> None:
    cpu = report.cpu
    cores = f"{cpu.physical_cores} cores, " if cpu.physical_cores else ""
    devices = [
        ("system", report.system),
        ("CPU", f"{cpu.model}, {cores}{cpu.logical_cores} threads"),
        ("instructions", ", ".join(cpu.instructions) or "unknown"),
    ]
    if report.memory_bytes is not None:
        free = f", {console.size(report.available_bytes)} available" if report.available_bytes is not None else ""
        devices.append(("memory", console.size(report.memory_bytes) + free))
    devices.append(("NVIDIA driver", report.driver or "none"))
    devices += [("CUDA device", f"{g.name}, SM {g.capability}, {console.size(g.memory_bytes)}") for g in report.gpus]
    if not report.gpus:
        devices.append(("CUDA device", "none that torch finds"))
    console.facts(devices)

    console.heading("Versions")
    rows = [["llmc", report.llmc, "", ""], ["python", report.python, "", ""]]
    rows += [[p.name, p.version or "absent", p.wanted, p.remedy] for p in report.packages]
    console.table(["package", "version", "required", "to install"], rows)

    console.heading("Targets: what this machine can do for each")
    console.table(
        ["target", "runtime", "capture", "compile", "run"],
        [[t.name, t.summary, str(t.capture), str(t.compile), str(t.run)] for t in report.targets],
    )
