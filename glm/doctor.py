"""``glm doctor``: what this machine has, what disagrees with what was pinned, and what breaks as a result."""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

GIB = 1 << 30
LEAST_MEMORY, LEAST_DISK = 5 * GIB, 5 * GIB
"""What the tiny run was seen to need, with room to spare."""
LEAST_SHM, GOOD_SHM = 64_000_000, GIB // 2
"""A container gets 64 MiB if nothing else is said; the tiny run lives with that, larger weights do not."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. ``wrong`` stops something required, ``note`` does not."""

    subject: str
    state: Literal["fine", "note", "wrong"]
    found: str
    breaks: str = ""


def diagnose(as_json: bool = False) -> int:
    """Prints all findings; 1 if something required is wrong."""
    findings = [*python_version(), *packages(), *devices(), *kernels(), *memory_and_disk()]
    if as_json:
        for finding in findings:
            print(json.dumps(asdict(finding)))
    else:
        _print_table(findings)
    return int(any(finding.state == "wrong" for finding in findings))


def python_version() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info < (3, 14)
    return [Finding("Python", "fine" if fits else "wrong", found, "" if fits else "the pinned packages exist for 3.11 to 3.13")]


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


def kernels() -> list[Finding]:
    """Optional packages with kernels for GPUs."""
    from glm.platform.kernels import apex, transformer_engine

    return [judge_transformer_engine(transformer_engine()), judge_apex(apex())]


def judge_transformer_engine(version: str | None) -> Finding:
    """megatron-core 0.16.1 names 2.9 to 2.11; without one a hardware file says kernels.attention: sdpa."""
    if version is None:
        return Finding("transformer-engine", "fine", "not installed: kernels.attention sdpa needs torch alone, te (GPUs only) needs it")
    release = tuple(int(part) for part in version.split(".")[:2])
    if (2, 9) <= release < (2, 12):
        return Finding("transformer-engine", "fine", version)
    return Finding("transformer-engine", "note", f"{version} (megatron-core names 2.9 to 2.11)", "kernels.attention: te was not checked with it")


def judge_apex(found: object) -> Finding:
    """NVIDIA's apex (glm.platform.kernels.Apex) is used when it is there and never asked for; another of that name is in the way."""
    if found.state == "unrelated":
        return Finding("apex", "wrong", "PyPI's apex, which is not NVIDIA's", "megatron imports it: pip uninstall apex")
    if found.state == "absent":
        return Finding("apex", "fine", "not installed: gradients on a GPU are added by torch")
    if found.adds_gradients:
        return Finding("apex", "fine", "NVIDIA's, adds weight gradients on a GPU in one kernel")
    return Finding("apex", "note", "NVIDIA's, built without its CUDA extensions", "not used: build it with --cpp_ext --cuda_ext")


def memory_and_disk() -> list[Finding]:
    return [
        judge_memory(*_memory()),
        judge_shm(_free("/dev/shm")),
        enough("disk here", _free("."), LEAST_DISK, "checkpoints and tokenized text of a run"),
    ]


def enough(subject: str, found: int | None, least: int, breaks: str) -> Finding:
    """``found`` bytes against what is needed; None: cannot be told."""
    if found is None:
        return Finding(subject, "note", "cannot be told on this machine", breaks)
    fits = found >= least
    text = f"{found / GIB:.1f} GiB free" + ("" if fits else f", {least / GIB:.1f} GiB needed")
    return Finding(subject, "fine" if fits else "wrong", text, "" if fits else breaks)


def judge_memory(total: int | None, available: int | None) -> Finding:
    """A machine that is too small is wrong; one that is merely busy may be free when the run starts."""
    breaks = "training and two SGLang servers do not fit side by side"
    if total is None or available is None:
        return enough("memory", None, LEAST_MEMORY, breaks)
    text = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if available >= LEAST_MEMORY:
        return Finding("memory", "fine", text)
    return Finding("memory", "note" if total >= LEAST_MEMORY else "wrong", f"{text}, {LEAST_MEMORY / GIB:.1f} GiB needed", breaks)


def judge_shm(free: int | None) -> Finding:
    """What a container gets by default is worth a note, less is wrong."""
    found = enough("/dev/shm", free, GOOD_SHM, "gloo and torch pass tensors between processes through it")
    return replace(found, state="note") if found.state == "wrong" and free >= LEAST_SHM else found


def _memory() -> tuple[int | None, int | None]:
    """Bytes in all and free: of the machine as the kernel estimates it, or of the container if its limit leaves less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (FileNotFoundError, KeyError):
        return None, None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
        return limited(total, available, limit, int(used), (group / "memory.stat").read_text())
    except FileNotFoundError:    # not in a version 2 control group
        return total, available


def limited(total: int, available: int, limit: str, used: int, stat: str) -> tuple[int, int]:
    """Both under a control group's ``memory.max``. Pages of files nobody has touched lately count as used there, and are free for the asking."""
    if limit == "max":
        return total, available
    inactive = dict(line.split() for line in stat.splitlines()).get("inactive_file", 0)
    return min(total, int(limit)), min(available, int(limit) - used + int(inactive))


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
