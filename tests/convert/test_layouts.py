"""A converted checkpoint is what megatron's ranks load under any layout, and what they save comes back byte for byte."""

import json

import pytest
import torch

from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.weights.hf_reader import HFFolder
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tests.ranks import run_ranks

full = pytest.mark.full
LAYOUTS = [
    (2, {"tp": 2, "etp": 2}),
    pytest.param(2, {"ep": 2}, marks=full),
    pytest.param(2, {"tp": 2, "ep": 2}, marks=full),
    pytest.param(2, {"pp": 2}, marks=full),
    pytest.param(2, {"pp": 2, "vpp": 2}, marks=full),
    pytest.param(4, {"tp": 2, "pp": 2, "etp": 2}, marks=full),
    pytest.param(4, {"tp": 2, "pp": 2, "ep": 2}, marks=full),
    pytest.param(4, {"pp": 2, "vpp": 2, "ep": 2, "pipeline_layers": [1, 2, 1, 0]}, marks=full),
    pytest.param(4, {"tp": 2, "ep": 2, "etp": 2}, marks=full),
    pytest.param(4, {"tp": 4, "ep": 4}, marks=full),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value))
def test_from_hf_then_ranks_that_load_and_save_then_to_hf_changes_no_byte(tmp_path, ranks, layout):
    shape = tiny_shape(num_query_groups=4)
    weights = {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16() for name, tensor in random_hf_weights(shape).items()
    }
    folder = write_hf_folder(tmp_path / "hf", shape, weights, dtype="bfloat16")
    checkpoint = from_hf(folder, tmp_path / "imported")
    run_ranks(
        "tests.convert.load_and_save_on_rank", ranks, str(folder), str(checkpoint), str(tmp_path / "saved"), str(ranks), json.dumps(layout),
    )
    to_hf(tmp_path / "saved", tmp_path / "out")
    found = HFFolder(tmp_path / "out")
    assert sorted(found.names) == sorted(weights)
    assert [name for name in weights if not _same(found.get(name), weights[name])] == []


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype is expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
