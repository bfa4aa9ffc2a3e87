"""Where tensors lie in files: every byte accounted for, and a header that lies is refused before a byte is used."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.errors import CheckpointError
from glm.model.size import parameters
from glm.weights.digest import tensor_digest
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import copies
from glm.weights.places import Place, safetensors_places
from tests.model_fixture import SHAPES, random_hf_weights


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5, generator=generator), "stack": torch.randn(3, 4, 2, generator=generator).bfloat16(),
        "bytes": torch.arange(13, dtype=torch.uint8), "one": torch.tensor(2.5), "none": torch.empty(0, 4),
        "small": torch.randn(8, 4, generator=generator).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def raw(path, header: bytes | dict, data: bytes):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_the_places_are_those_safetensors_reads(file):
    expected = load_file(file)
    found = safetensors_places(file)
    assert found.keys() == expected.keys()
    assert sum(place.nbytes for place in found.values()) == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        read = found[name].read()
        assert read.dtype is tensor.dtype and read.shape == tensor.shape, name
        assert tensor_digest(read) == tensor_digest(tensor) == found[name].digest() == found[name].digest(chunk_bytes=3), name


def test_rows_and_items_are_parts_of_the_bytes(file):
    stack, tensor = safetensors_places(file)["stack"], load_file(file)["stack"]
    assert torch.equal(stack.rows(1, 3).read(), tensor[1:3]) and torch.equal(stack.item(2).read(), tensor[2])
    assert torch.equal(stack.item(1).rows(2, 4).read(), tensor[1, 2:4])
    with pytest.raises(AssertionError):
        stack.rows(2, 4)


def test_a_file_cut_after_its_header_was_read_is_told(file):
    place = safetensors_places(file)["matrix"]
    file.write_bytes(file.read_bytes()[: place.offset + 100])
    for use in (place.read, place.digest):
        with pytest.raises(CheckpointError, match="x.safetensors\n.*the file ends at byte"):
            use()


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:20], lambda b: b[:5], lambda b: b""],
                         ids=["cut", "too long", "header cut", "length cut", "empty"])
def test_a_file_of_another_length_is_refused_by_name(file, change):
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match="x.safetensors\n.*bytes"):
        safetensors_places(file)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("header", "words"), [
    (b"\xff\xfe garbage", "header that is not one"),
    (b"[1, 2]", "header of type list"),
    (b'{"a": ' + json.dumps(A).encode() + b', "a": ' + json.dumps(A).encode() + b"}", "a twice"),
    ({"a": A | {"data_offsets": [0, 4]}}, r"x: a\n.*4 bytes\n.*8 for F32 \[2\]"),
    ({"a": A | {"shape": [3]}}, r"x: a\n.*8 bytes\n.*12 for F32"),
    ({"a": A | {"shape": [-2]}}, r"x: a\n.*\n.*dtype, shape and data_offsets"),
    ({"a": A | {"dtype": "Q3"}}, r"x: a\n.*data type Q3"),
    ({"a": {"dtype": "F32"}}, r"x: a\n"),
    ({"a": 7}, r"x: a\n"),
    ({"a": A, "b": A}, r"x: b\n.*begins at byte"),
    ({"a": A | {"data_offsets": [4, 12]}}, r"x: a\n.*begins at byte"),
    ({}, "18 bytes\n.*10 bytes, which the tensors of its header need"),
])
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, header, words):
    with pytest.raises(CheckpointError, match=words):
        safetensors_places(raw(tmp_path / "x", header, b"\0" * 8))


def test_a_header_that_claims_to_be_endless_is_not_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="the header would be"):
        safetensors_places(path)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_those_of_transformers_and_count_the_model(name):
    shape = SHAPES[name]
    weights, found = random_hf_weights(shape), hf_shapes(shape)
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == {
        key: value for key, value in found.items() if key not in copies(shape)
    }
    biases = sum(tensor.numel() for key, tensor in weights.items() if key.endswith("correction_bias"))
    assert sum(tensor.numel() for tensor in weights.values()) == parameters(shape).total + biases


def test_a_place_counts_its_bytes():
    assert Place(None, 0, torch.bfloat16, (3, 5)).nbytes == 30 and Place(None, 0, torch.float32, ()).nbytes == 4
