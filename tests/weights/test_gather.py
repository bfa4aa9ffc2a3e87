"""Two ranks that share the experts export what one rank exports, themselves and through their checkpoint."""

import torch
from safetensors.torch import load_file

from glm.convert.to_hf import to_hf
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tests.ranks import run_ranks


def test_two_ranks_export_what_one_exports(tmp_path):
    shape = tiny_shape()
    weights = random_hf_weights(shape)
    folder = write_hf_folder(tmp_path / "hf", shape, weights)
    run_ranks("tests.weights.export_on_rank", 2, str(folder), str(tmp_path), "2")
    to_hf(tmp_path / "checkpoints/step_00000001", tmp_path / "export")
    for file in ("first", "export/model"):
        found = load_file(tmp_path / f"{file}.safetensors")
        assert found.keys() == weights.keys()
        assert [name for name in weights if not torch.equal(found[name], weights[name])] == [], file
