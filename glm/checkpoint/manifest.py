"""A checkpoint's manifest.json: what it is, and the digests of its bytes. Needs neither megatron nor a process group.

Files of tensors are digested item by item (an item is a chunk of a tensor as it is stored), so a changed byte is told with
the tensor's name, and a reader of some tensors need not read the others.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from glm.checkpoint import torch_dist
from glm.errors import CheckpointError
from glm.recipe.sections import Model

MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_READERS = 4
"""Threads of one process that digest at a time: one does 1.4 GB/s."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself, readable without loading it."""

    stage: str
    step: int
    stage_tokens: int
    run_tokens: int
    rotary_base: int
    megatron: dict = field(default_factory=dict)
    """The recipe's section of that name: whoever rebuilds the model needs it too."""
    guard: dict = field(default_factory=dict)
    """What refuses a step (glm.train.guard.History): a resumed run decides as if it had never stopped."""


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """Everything with a checkpoint's name, oldest first, whatever is in it."""
    return sorted((path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()), key=step_of)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in ``folder``, oldest first."""
    return [step_of(path) for path in step_folders(folder) if (path / MANIFEST).exists()]


def newest_checkpoint(folder: Path) -> Path | None:
    steps = checkpoint_steps(folder)
    return folder / step_folder(steps[-1]) if steps else None


def read_info(checkpoint: Path) -> tuple[CheckpointInfo, Model]:
    """The checkpoint's own description and the shape of its model. Raises CheckpointError when it is not one."""
    manifest = read_manifest(checkpoint)
    try:
        return CheckpointInfo(**manifest["info"]), Model(**manifest["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            str(checkpoint / MANIFEST), f"{type(error).__name__}: {str(error)[:200]}", "the manifest of this release",
            "use the release that wrote it, or make the checkpoint again",
        ) from error


def stored_params(checkpoint: Path) -> str:
    """``fp32`` or ``bf16``: the type the checkpoint's weights are stored in. Raises CheckpointError when it is not one."""
    return read_manifest(checkpoint)["params"]


def read_manifest(checkpoint: Path) -> dict:
    path = checkpoint / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            str(checkpoint), "no manifest.json", "a checkpoint folder such as RUN/stages/STAGE/checkpoints/step_00000120",
            "give the folder of a run or of one of its checkpoints",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), str(error), "JSON", f"remove {checkpoint} to continue from the one before it") from error


def seal(manifest: dict) -> dict:
    """The manifest with a digest of itself, so that a changed bit in it is told like one in the files it vouches for."""
    return manifest | {"sha256": _own_digest(manifest)}


def digest_files(folder: Path, known: dict[tuple[str, int, int], str] | None = None) -> dict[str, dict]:
    """The manifest's entry for every file of a checkpoint just written: its size, and digests of its items or of the whole.

    ``known``: {(file, offset, bytes): sha256} of what the ranks digested as they wrote; the rest is read here.
    """
    known = known or {}
    of_file: dict[str, list[torch_dist.Item]] = {}
    for item in torch_dist.items(folder):
        of_file.setdefault(item.file, []).append(item)
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(folder)), path.stat().st_size
        entries[name] = {"bytes": size}
        if name in of_file:
            entries[name]["items"] = {
                item.label: {
                    "offset": item.offset, "bytes": item.length,
                    "sha256": known.get((name, item.offset, item.length)) or range_digest(path, item.offset, item.length),
                }
                for item in of_file[name]
            }
        else:
            entries[name]["sha256"] = range_digest(path, 0, size)
    return entries


def verify(checkpoint: Path, share: int = 0, shares: int = 1) -> bool:
    """Compares every file with the manifest's size and digests. Raises CheckpointError naming the first that differs.

    Of ``shares`` verifiers each reads its own even part of the bytes. False when the checkpoint was written without
    digests: sizes were compared, contents could not be.
    """
    manifest = read_manifest(checkpoint)
    if manifest.get("sha256") not in (None, _own_digest(manifest)):
        _corrupt(checkpoint / MANIFEST, checkpoint / MANIFEST, f"sha256 {_own_digest(manifest)[:16]}…", f"sha256 {manifest['sha256'][:16]}…")
    try:
        files = manifest["files"]
        check_sizes(checkpoint, files)
        listed = [(name, label, part) for name, entry in files.items() for label, part in parts(entry).items()]
        total, before = sum(part["bytes"] for _, _, part in listed), 0
    except (KeyError, TypeError, AttributeError) as error:
        _corrupt(checkpoint / MANIFEST, checkpoint / MANIFEST, f"{type(error).__name__}: {str(error)[:200]}", "the manifest as it was written")
    own = []
    for name, label, part in listed:
        if before * shares // max(1, total) == share:
            own.append((checkpoint / name, label, part))
        before += part["bytes"]
    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(lambda arguments: check_part(*arguments), own):
            pass
    return all(parts(entry) for entry in files.values())


def check_sizes(checkpoint: Path, files: dict[str, dict]) -> None:
    """Raises CheckpointError for a file that is missing or of another size than the manifest's."""
    for name, entry in files.items():
        path = checkpoint / name
        if not path.exists():
            _corrupt(path, path, "no such file", f"{entry['bytes']} bytes")
        if path.stat().st_size != entry["bytes"]:
            _corrupt(path, path, f"{path.stat().st_size} bytes", f"{entry['bytes']} bytes")


def parts(entry: dict) -> dict[str, dict]:
    """{label: {offset, bytes, sha256}} of what the manifest can prove of a file; {} for one written without digests."""
    if "items" in entry:
        return entry["items"]
    return {"": {"offset": 0, "bytes": entry["bytes"], "sha256": entry["sha256"]}} if "sha256" in entry else {}


def check_part(path: Path, label: str, part: dict) -> None:
    """Raises CheckpointError naming file and tensor when the bytes are not those that were written."""
    digest = range_digest(path, part["offset"], part["bytes"])
    if digest != part["sha256"]:
        _corrupt(path, f"{path}: {label}" if label else path, f"sha256 {digest[:16]}…", f"sha256 {part['sha256'][:16]}…")


def range_digest(path: Path, offset: int, length: int) -> str:
    """Hex SHA-256 of ``length`` bytes of a file, of which one block is in memory at a time."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, length)))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while length:
            count = file.readinto(buffer[: min(len(buffer), length)])
            if not count:
                break  # the digest of fewer bytes is another one
            digest.update(buffer[:count])
            length -= count
    return digest.hexdigest()


def _own_digest(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _corrupt(path: Path, where: object, found: str, expected: str) -> None:
    raise CheckpointError(
        str(where), found, expected,
        f"the file changed after it was written; remove {path.parent} to continue from the checkpoint before it",
    )
