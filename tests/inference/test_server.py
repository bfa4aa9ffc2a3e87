"""Starting, failing and ending a server process."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from glm.errors import EngineError, PlatformError, RecipeError
from glm.inference.serve import checked_arguments
from glm.inference.server import EngineServer, ServerSpec, _shared_memory_of, log_tail, server_arguments
from glm.inference.speculative import acceptance_length, speculative_arguments
from glm.platform.host_sglang.environment import server_environment


def test_a_port_in_use_is_named_at_once(model_folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(PlatformError, match=f"port {port}"):
            EngineServer(ServerSpec(model_folder, "host", port=port), tmp_path / "log").start()
        assert time.monotonic() - started < 2


def test_a_folder_without_a_model_is_an_error_before_anything_starts(tmp_path):
    with pytest.raises(EngineError, match="no config.json"):
        EngineServer(ServerSpec(tmp_path, "host"), tmp_path / "log").start()


def test_an_unknown_field_of_server_args_ends_the_server_with_the_nearest_name(model_folder, tmp_path):
    spec = ServerSpec(model_folder, "host", extra={"chunked_prefil_size": 64})
    with EngineServer(spec, tmp_path / "log") as server:
        with pytest.raises(EngineError, match="such as chunked_prefill_size"):
            server.wait_ready(60)
        assert not server.alive


def test_the_escape_map_may_not_set_what_the_recipe_owns():
    for key in ("port", "speculative_num_steps"):
        with pytest.raises(RecipeError, match="decides elsewhere"):
            checked_arguments({}, {key: 1})
    assert checked_arguments({"port": 1}, {"chunked_prefill_size": 64}) == {"port": 1, "chunked_prefill_size": 64}


def test_a_server_that_ends_before_it_reads_its_settings_is_told_with_its_log(model_folder, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken installation\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    spec = ServerSpec(model_folder, "host", extra={"note": "x" * 500_000})  # more than a pipe holds: the write meets its end
    with pytest.raises(EngineError, match="(?s)status 3.*broken installation"):
        EngineServer(spec, tmp_path / "log").start()


@pytest.fixture
def stranger():
    """Somebody else's server: says 200 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


@pytest.mark.parametrize("seconds, found", [(0, "stopped with status 0"), (60, "another server answers")])
def test_a_stranger_that_answers_on_the_port_is_not_taken_for_the_server(model_folder, tmp_path, stranger, seconds, found):
    server = EngineServer(ServerSpec(model_folder, "host"), tmp_path / "log")
    server._scratch = tempfile.TemporaryDirectory()
    server.port = stranger
    server._process = subprocess.Popen(["sleep", str(seconds)], start_new_session=True)
    if not seconds:
        server._process.wait()
    try:
        with pytest.raises(EngineError, match=found):
            server.wait_ready(10)
    finally:
        server.stop()


def group_of(leader):
    """Processes of the group, zombies left out."""
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue  # ended while we looked
    return alive


def ends_within(seconds, leader):
    """A killed process is gone a moment after the signal, not at once."""
    deadline = time.monotonic() + seconds
    while group_of(leader) and time.monotonic() < deadline:
        time.sleep(0.1)
    return group_of(leader) == []


def test_no_process_outlives_a_parent_that_is_killed(model_folder, tmp_path):
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from glm.inference.server import EngineServer, ServerSpec
        server = EngineServer(ServerSpec(Path({str(model_folder)!r}), "host"), Path({str(tmp_path / 'log')!r}))
        server.start()
        server.wait_ready(90)
        print(server.pid, flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        leader = int(parent.stdout.readline())
        assert len(group_of(leader)) >= 3  # http, scheduler, detokenizer
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert ends_within(10, leader)


def test_a_stopped_server_leaves_no_process_and_no_file(server, model_folder, tmp_path):
    with EngineServer(ServerSpec(model_folder, "host"), tmp_path / "log") as second:
        second.wait_ready(120)
        leader, scratch, shared = second.pid, Path(second._scratch.name), _shared_memory_of(second.pid)
        assert scratch.is_dir() and shared
    assert ends_within(5, leader) and not scratch.exists() and not any(path.exists() for path in shared)
    assert all(path.exists() for path in _shared_memory_of(server.pid))  # the other server's are its own


def test_the_key_is_not_in_the_process_list(server):
    assert server.spec.api_key not in " ".join(psutil.Process(server.pid).cmdline())
    assert server.spec.api_key not in repr(server.spec)


def test_the_stand_ins_are_for_the_host_only(monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", "host")  # left over in a shell
    assert "SGLANG_PLATFORM" not in server_environment("cuda")
    assert "CUDA_VISIBLE_DEVICES" not in server_environment("cuda") or "CUDA_VISIBLE_DEVICES" in os.environ
    assert server_environment("host")["OMP_NUM_THREADS"] == "1"
    cuda = server_arguments(ServerSpec(Path("model"), "cuda", dtype="bfloat16", tp=8), 1, 2)
    assert not {"device", "attention_backend", "sampling_backend", "disable_cuda_graph"} & set(cuda)
    assert (cuda["dtype"], cuda["tp_size"]) == ("bfloat16", 8)


def test_draft_steps_become_a_chain_verified_by_rejection():
    assert speculative_arguments(0, "model") == {}
    three = speculative_arguments(3, "model")
    assert (three["speculative_num_steps"], three["speculative_eagle_topk"], three["speculative_num_draft_tokens"]) == (3, 1, 4)
    assert three["speculative_use_rejection_sampling"] is True


def test_acceptance_length_counts_tokens_per_verification():
    class Reply:
        def __init__(self, tokens, rounds):
            self.token_ids, self.verify_rounds = list(range(tokens)), rounds

    assert acceptance_length([Reply(9, 4), Reply(5, 4)]) == 12 / 8
    assert acceptance_length([Reply(9, None)]) is None


def test_the_log_is_told_from_its_last_traceback_on(tmp_path):
    log = tmp_path / "log"
    log.write_text("start\n" * 100 + "Traceback (most recent call last):\n  File x\nValueError: why\n" + "after\n" * 3)
    assert log_tail(log).startswith("Traceback") and "ValueError: why" in log_tail(log)
    assert log_tail(tmp_path / "none") == "(empty)"
