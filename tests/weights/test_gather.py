"""Two ranks that share the experts export what one rank exports, themselves and through their checkpoint."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from glm.convert.to_hf import to_hf
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(world_size: int, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "tests.weights.export_on_rank", *arguments]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        })
        for rank in range(world_size)
    ]
    told = [process.communicate(timeout=120)[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(told)


def test_two_ranks_export_what_one_exports(tmp_path):
    shape = tiny_shape()
    weights = random_hf_weights(shape)
    folder = write_hf_folder(tmp_path / "hf", shape, weights)
    run_ranks(2, str(folder), str(tmp_path), "2")
    to_hf(tmp_path / "checkpoints/step_00000001", tmp_path / "export")
    for file in ("first", "export/model"):
        found = load_file(tmp_path / f"{file}.safetensors")
        assert found.keys() == weights.keys()
        assert [name for name in weights if not torch.equal(found[name], weights[name])] == [], file
