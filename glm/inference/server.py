"""An SGLang server as a child process: started, waited for, and gone when its owner is."""

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from glm.errors import EngineError, PlatformError
from glm.inference.speculative import speculative_arguments
from glm.platform.host_sglang.environment import server_environment

LOOPBACK = "127.0.0.1"
HOST_CACHE_TOKENS = 65_536
"""Most tokens of keys and values a host server holds; further requests wait. The recipe's sglang.max_total_tokens wins."""


@dataclass(frozen=True)
class ServerSpec:
    """What to serve and how. ``extra`` holds further fields of SGLang's ServerArgs, checked when the server starts."""

    model_folder: Path
    platform: str
    """host or cuda."""
    port: int = 0
    """0 takes a free one."""
    api_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    num_draft_steps: int = 0
    """Draft tokens a round from the MTP layer; 0 decodes plainly."""
    context_length: int | None = None
    """Longest prompt plus reply; None: the model's."""
    max_running_requests: int = 128
    memory_fraction: float = 0.8
    """Share of the device's memory for weights and keys/values (cuda only)."""
    seed: int = 0
    tp: int = 1
    dtype: str = "float32"
    """float32 or bfloat16."""
    weight_version: str = "0"
    """What replies report until the first weight update."""
    batch_invariant: bool = False
    """Host only: bitwise the same reply whoever is in the batch. Needs AVX-512 and a number of experts divisible by 32:
    torch computes the router's sigmoid 32 numbers at a time, and a remainder by another formula."""
    extra: dict[str, object] = field(default_factory=dict)


class EngineServer:
    """One server, in a process group of its own, bound to loopback. Ends with this process, however this one ends."""

    def __init__(self, spec: ServerSpec, log_file: Path):
        self.spec, self.log_file = spec, Path(log_file)
        self.port = spec.port
        self._process: subprocess.Popen | None = None
        self._scratch: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "EngineServer":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process and returns at once. Raises PlatformError when the port is taken, EngineError when the
        folder holds no model or the process ends at once."""
        assert self._process is None, "already started"
        if not (Path(self.spec.model_folder) / "config.json").is_file():
            raise EngineError(f"model folder {self.spec.model_folder}", "no config.json in it", "a Hugging Face model folder",
                              "export the model first, or correct the path")
        experts = self._config().get("n_routed_experts", 0)
        if self.spec.batch_invariant and (self.spec.platform != "host" or experts % 32):
            raise PlatformError("batch_invariant of the inference server", f"platform {self.spec.platform}, {experts} experts",
                                "platform host and a number of experts divisible by 32", "serve without batch_invariant")
        self.port, rendezvous = _ports(self.spec.port)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix="glm-server-", ignore_cleanup_errors=True)
        settings = {"parent": os.getpid(), "platform": self.spec.platform, "extra": self.spec.extra,
                    "arguments": server_arguments(self.spec, self.port, rendezvous)}
        # a file, not a pipe: SGLang's helper processes inherit it and would keep a reader waiting for ever
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "glm.inference.serve"], stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
                env=server_environment(self.spec.platform, batch_invariant=self.spec.batch_invariant, scratch=self._scratch.name),
            )
        try:
            with self._process.stdin as pipe:
                pipe.write(json.dumps(settings).encode())
        except BrokenPipeError:
            self.stop()
            self._fail(f"the server stopped with status {self._process.returncode} before it read its settings")

    def wait_ready(self, timeout_seconds: float = 180) -> None:
        """Returns when the server answers. Raises EngineError with the end of its log when it stops or takes too long."""
        assert self._process is not None, "not started"
        deadline = time.monotonic() + timeout_seconds
        while True:
            answers = self._get("/health") == 200
            # asked after the answer: a server that found its port taken meanwhile is gone, and another one answered
            if self._process.poll() is not None:
                self._fail(f"the server stopped with status {self._process.returncode}")
            if answers:
                break
            if time.monotonic() > deadline:
                self.stop()
                self._fail(f"no answer after {timeout_seconds:.0f} s")
            time.sleep(0.1)
        status = self._get("/model_info", key=self.spec.api_key), self._get("/model_info", key="another key")
        if status != (200, 401):
            self.stop()
            self._fail(f"another server answers on its port: status {status[0]} to the key, {status[1]} to another key")

    def stop(self, grace_seconds: float = 1) -> None:
        """Asks the server to end, and after ``grace_seconds`` ends every process of its group. It would drain for 7 s by
        itself; it holds nothing worth waiting for."""
        if self._process is None:
            return
        shared = _shared_memory_of(self._process.pid)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                pass  # the group is ended below, with the processes the server left behind
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nobody of the group is left
        self._process.wait()
        for path in shared:
            path.unlink(missing_ok=True)
        self._scratch.cleanup()

    def _config(self) -> dict:
        return json.loads((Path(self.spec.model_folder) / "config.json").read_text())

    def _get(self, path: str, *, key: str | None = None) -> int | None:
        """The status of the answer; None where nobody answers."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=5)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _fail(self, what: str):
        raise EngineError(f"inference server on {self.url} ({self.log_file})",
                          f"{what}; its log ends:\n{log_tail(self.log_file)}", "a server that answers /health",
                          "read the log above; the whole of it is in the file named")


def server_arguments(spec: ServerSpec, port: int, rendezvous_port: int) -> dict[str, object]:
    """The fields of SGLang's ServerArgs for ``spec``."""
    folder = str(spec.model_folder)
    arguments: dict[str, object] = {
        "model_path": folder,
        "host": LOOPBACK,
        "port": port,
        "nccl_port": rendezvous_port,
        "api_key": spec.api_key,
        "dtype": spec.dtype,
        "tp_size": spec.tp,
        "random_seed": spec.seed,
        "weight_version": spec.weight_version,
        "max_running_requests": spec.max_running_requests,
        "mem_fraction_static": spec.memory_fraction,
        "skip_server_warmup": True,
        "grammar_backend": "none",
        "reasoning_parser": "glm45",
        "tool_call_parser": "glm",
        "log_level": "info",
        "log_level_http": "warning",
    }
    if spec.context_length is not None:
        arguments["context_length"] = spec.context_length
    if spec.platform == "host":
        arguments |= {
            "device": "cpu",
            # named: without it SGLang picks torch_native on a CPU, which has no draft mode
            "attention_backend": "host_sdpa",
            "disable_cuda_graph": True,
            # an idle scheduler polls without pause, and its core is one the trainer needs
            "sleep_on_idle": True,
            "sampling_backend": "pytorch",
            # otherwise SGLang takes memory_fraction of the machine's memory for keys and values, and fills it with zeros
            "max_total_tokens": min(spec.max_running_requests * _context_length(spec), HOST_CACHE_TOKENS),
        }
    return arguments | speculative_arguments(spec.num_draft_steps, folder)


def _shared_memory_of(group: int) -> list[Path]:
    """Files of SGLang's load reports that processes of the group hold open: nobody deletes them after a kill, nor after
    a graceful end (sglang/srt/managers/load_snapshot.py:303)."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.getpgid(int(fd.parts[2])) == group and (target := os.readlink(fd)).startswith("/dev/shm/sglang_loads_"):
                found.append(Path(target))
        except OSError:
            continue  # the process or the file ended while we looked
    return found


def _context_length(spec: ServerSpec) -> int:
    if spec.context_length is not None:
        return spec.context_length
    return json.loads((Path(spec.model_folder) / "config.json").read_text())["max_position_embeddings"]


def log_tail(log_file: Path, lines: int = 25) -> str:
    """The last lines of a log, from the last traceback or error on where there is one."""
    text = log_file.read_text(errors="replace").splitlines() if log_file.exists() else []
    starts = [i for i, line in enumerate(text) if line.startswith(("RecipeError", "PlatformError", "EngineError", "Traceback"))
              or "Traceback (most recent call last)" in line]
    if starts and len(text) - starts[-1] < 4 * lines:
        return "\n".join(text[starts[-1]:][-2 * lines:])
    return "\n".join(text[-lines:]) or "(empty)"


def _ports(wanted: int) -> tuple[int, int]:
    """The HTTP port and one for the processes' rendezvous, both free now. Raises PlatformError when ``wanted`` is taken."""
    with socket.socket() as http_socket, socket.socket() as rendezvous:
        http_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            http_socket.bind((LOOPBACK, wanted))
        except OSError as problem:
            raise PlatformError(f"port {wanted} of {LOOPBACK}", f"it is in use ({problem.strerror})", "a free port",
                                "stop the process that listens there, or name another port (0 takes a free one)") from None
        rendezvous.bind((LOOPBACK, 0))
        return http_socket.getsockname()[1], rendezvous.getsockname()[1]
