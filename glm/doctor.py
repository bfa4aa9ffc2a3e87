"""``glm doctor``: what this machine has, what disagrees with what was pinned, and what breaks as a result."""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

GIB = 1 << 30
LEAST_MEMORY, LEAST_SHM, LEAST_DISK = 8 * GIB, GIB // 2, 5 * GIB
"""What the tiny run was seen to need, with room to spare."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. ``wrong`` stops something required, ``note`` does not."""

    subject: str
    state: Literal["fine", "note", "wrong"]
    found: str
    breaks: str = ""


def diagnose(as_json: bool = False) -> int:
    """Prints all findings; 1 if something required is wrong."""
    findings = [*python_version(), *packages(), *devices(), *memory_and_disk()]
    if as_json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        _print_table(findings)
    return int(any(finding.state == "wrong" for finding in findings))


def python_version() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    new_enough = sys.version_info >= (3, 11)
    return [Finding("Python", "fine" if new_enough else "wrong", found, "" if new_enough else "3.11 or newer is needed")]


def packages() -> list[Finding]:
    """Pinned against installed versions."""
    from glm.platform.versions import BREAKS, OPTIONAL, PINNED, PLATFORM_TORCH

    return [
        judge_package(name, pinned, installed_version(name), PLATFORM_TORCH.values() if name == "torch" else (), BREAKS[name], name in OPTIONAL)
        for name, pinned in PINNED.items()
    ]


def judge_package(name: str, pinned: str, installed: str | None, also: object, breaks: str, optional: bool) -> Finding:
    """A missing package is wrong unless optional; another version may work, so it is a note. ``also``: versions as good."""
    if installed is None:
        return Finding(name, "note" if optional else "wrong", f"not installed (pinned: {pinned})", breaks)
    if installed.partition("+")[0] in (pinned, *also):    # torch says 2.13.0+cpu
        return Finding(name, "fine", installed)
    return Finding(name, "note", f"{installed} (pinned: {pinned})", f"not checked with this version: {breaks}")


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[Finding]:
    """What torch sees, and whether that is what the machine seems to have."""
    try:
        import torch
    except ImportError as problem:
        return [Finding("device", "wrong", f"torch cannot be imported: {problem}", "nothing trains")]
    cores = len(os.sched_getaffinity(0))
    found = [Finding("cores", "fine" if cores >= 2 else "note", str(cores), "" if cores >= 2 else "two ranks share one core: about half the speed")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        return [*found, Finding("device", "fine", f"{torch.accelerator.device_count()} x {kind}: hardware h200_8 and the like")]
    if os.path.exists("/dev/nvidia0"):
        return [*found, Finding(
            "device", "note", "/dev/nvidia0 exists, but torch sees no device", "platform cuda: the driver, or a torch built for CPUs only"
        )]
    return [*found, Finding("device", "fine", "no GPU: hardware host trains and serves on the CPU")]


def memory_and_disk() -> list[Finding]:
    return [
        enough("memory", _available_memory(), LEAST_MEMORY, "training and two SGLang servers do not fit side by side"),
        enough("/dev/shm", _free("/dev/shm"), LEAST_SHM, "gloo and torch pass tensors between processes through it"),
        enough("disk here", _free("."), LEAST_DISK, "checkpoints and tokenized text of a run"),
    ]


def enough(subject: str, found: int | None, least: int, breaks: str) -> Finding:
    """``found`` bytes against what is needed; None: cannot be told."""
    if found is None:
        return Finding(subject, "note", "cannot be told on this machine", breaks)
    fits = found >= least
    text = f"{found / GIB:.1f} GiB free" + ("" if fits else f", {least / GIB:.1f} GiB needed")
    return Finding(subject, "fine" if fits else "wrong", text, "" if fits else breaks)


def _available_memory() -> int | None:
    """The kernel's estimate, or what the container's limit leaves if that is less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (FileNotFoundError, StopIteration):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
            maximum = limit.read().strip()
            return available if maximum == "max" else min(available, int(maximum) - int(used.read()))
    except FileNotFoundError:    # not in a version 2 control group
        return available


def _free(path: str) -> int | None:
    return shutil.disk_usage(path).free if os.path.isdir(path) else None


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", "found", "what breaks")
    marks = {"fine": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[red]WRONG[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.subject, finding.found, finding.breaks)
    Console().print(table)
