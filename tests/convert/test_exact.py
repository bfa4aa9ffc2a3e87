"""Every tensor comes back with the bytes and the type it had, whatever chunks the checkpoint holds it in."""

import math
import random
from pathlib import Path

import pytest
import torch

from glm.checkpoint import manifest, torch_dist
from glm.checkpoint.run_folder import write_json
from glm.checkpoint.torch_dist import Item, Stored
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.errors import CheckpointError
from glm.weights.arrangement import arrangement
from glm.weights.fp8 import fp8_plan, fp8_tensors, scale_name
from glm.weights.hf_folder import write_folder
from glm.weights.hf_reader import HFFolder
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import copies, hf_names, rows
from tests.model_fixture import SHAPES, random_hf_weights, tiny_shape, write_hf_folder

SHAPE = tiny_shape()
ROUTER, BIAS = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"


def in_bfloat16(weights: dict[str, torch.Tensor], but: tuple[str, ...] = ("correction_bias",)) -> dict[str, torch.Tensor]:
    return {name: tensor if name.endswith(but) else tensor.bfloat16() for name, tensor in weights.items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    read = HFFolder(folder)
    return {name: read.place(name).read() for name in read.names}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [
        name for name, tensor in expected.items()
        if found[name].dtype is not tensor.dtype or not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    ]


def there_and_back(tmp_path: Path, weights: dict[str, torch.Tensor], shape=SHAPE, dtype="float32", **options) -> dict[str, torch.Tensor]:
    source = write_hf_folder(tmp_path / "hf", shape, weights, dtype=dtype)
    to_hf(from_hf(source, tmp_path / "ck"), tmp_path / "out", **options)
    return tensors(tmp_path / "out")


@pytest.mark.parametrize("name", SHAPES)
def test_float32_of_every_shape(tmp_path, name):
    weights = random_hf_weights(SHAPES[name])
    assert differing(there_and_back(tmp_path, weights, SHAPES[name]), weights) == []


@pytest.mark.parametrize("kept", [("correction_bias",), ("correction_bias", "gate.weight")], ids=["router bfloat16", "router float32"])
def test_a_bfloat16_model_with_its_router_in_the_type_it_had(tmp_path, kept):
    weights = in_bfloat16(random_hf_weights(SHAPE), kept)
    assert differing(there_and_back(tmp_path, weights, dtype="bfloat16"), weights) == []


def test_tensors_of_mixed_types_each_keep_theirs(tmp_path):
    weights = random_hf_weights(SHAPE)
    weights = {name: tensor if number % 3 else tensor.bfloat16() for number, (name, tensor) in enumerate(weights.items())}
    weights[BIAS] = weights[BIAS].float()
    weights = {name: tensor.float() if name.endswith("correction_bias") else tensor for name, tensor in weights.items()}
    assert differing(there_and_back(tmp_path, weights), weights) == []


def test_values_that_are_no_numbers_keep_their_bits(tmp_path):
    weights = in_bfloat16(random_hf_weights(SHAPE))
    odd = torch.tensor([0x7F81, 0x7FC1, -0x7F, -0x8000, 1, 0x7F80], dtype=torch.int16).view(torch.bfloat16)
    for name in (ROUTER, "lm_head.weight"):
        weights[name].view(-1)[: len(odd)] = odd
    assert differing(there_and_back(tmp_path, weights, dtype="bfloat16"), weights) == []


def test_routers_that_bfloat16_cannot_hold_are_exported_in_float32_all_of_them(tmp_path):
    """As training leaves them: the checkpoint does not say what an imported folder had."""
    weights = in_bfloat16(random_hf_weights(SHAPE), ("correction_bias", ".1.mlp.gate.weight"))
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", SHAPE, weights, dtype="bfloat16"), tmp_path / "ck")
    forget_the_form(checkpoint)
    to_hf(checkpoint, tmp_path / "out")
    found = tensors(tmp_path / "out")
    changed = [name for name in weights if found[name].dtype is not weights[name].dtype]
    assert changed == [f"model.layers.{layer}.mlp.gate.weight" for layer in (2, 3, 4)]
    assert all(torch.equal(found[name].float(), weights[name].float()) for name in weights)


def forget_the_form(checkpoint: Path) -> None:
    told = manifest.read_manifest(checkpoint)
    del told["hf"]
    write_json(checkpoint / "manifest.json", told)


def test_routers_that_bfloat16_holds_are_exported_in_bfloat16(tmp_path):
    weights = in_bfloat16(random_hf_weights(SHAPE))
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", SHAPE, weights, dtype="bfloat16"), tmp_path / "ck")
    forget_the_form(checkpoint)
    to_hf(checkpoint, tmp_path / "out")
    assert differing(tensors(tmp_path / "out"), weights) == []


def test_a_manifest_that_tells_of_a_type_the_values_do_not_fit_is_refused(tmp_path):
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", SHAPE, random_hf_weights(SHAPE)), tmp_path / "ck")
    told = manifest.read_manifest(checkpoint)
    told["hf"]["dtypes"] = {"lm_head.weight": "bfloat16"}
    write_json(checkpoint / "manifest.json", told)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight\n.*cannot hold"):
        to_hf(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "hf"]


@pytest.mark.parametrize(("stored", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_another_type_is_stored_when_asked_for_and_the_router_bias_stays(tmp_path, stored, dtype):
    weights = in_bfloat16(random_hf_weights(SHAPE)) if stored == "fp32" else random_hf_weights(SHAPE)
    source = write_hf_folder(tmp_path / "hf", SHAPE, weights, dtype="bfloat16" if stored == "fp32" else "float32")
    checkpoint = from_hf(source, tmp_path / "ck", params=stored)
    held = torch_dist.tensors(checkpoint)
    assert manifest.stored_params(checkpoint) == stored
    assert {tensor.dtype for key, tensor in held.items() if ".router." not in key} == {dtype}
    assert {tensor.dtype for key, tensor in held.items() if ".router." in key} == {torch.float32}
    to_hf(checkpoint, tmp_path / "out")
    found = tensors(tmp_path / "out")
    kept = ("mlp.gate.weight", "correction_bias")
    expected = {name: tensor.float() if name.endswith(kept) else tensor.to(dtype) for name, tensor in weights.items()}
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in weights) and found[BIAS].dtype is torch.float32


@pytest.mark.parametrize("with_copies", [True, False])
def test_copies_in_the_mtp_layer_are_exported_when_the_source_had_them(tmp_path, with_copies):
    weights = random_hf_weights(SHAPE)
    if with_copies:
        weights |= {copy: weights[original].clone() for copy, original in copies(SHAPE).items()}
    assert differing(there_and_back(tmp_path, weights), weights) == []


def test_copies_are_exported_or_left_out_on_request(tmp_path):
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", SHAPE, random_hf_weights(SHAPE)), tmp_path / "ck")
    for wanted in (True, False):
        to_hf(checkpoint, tmp_path / "out", with_copies=wanted)
        assert (copies(SHAPE).keys() <= tensors(tmp_path / "out").keys()) is wanted


def test_a_copy_that_is_none_is_refused_and_nothing_is_written(tmp_path):
    weights = random_hf_weights(SHAPE)
    weights |= {copy: weights[original].clone() for copy, original in copies(SHAPE).items()}
    weights["model.layers.4.embed_tokens.weight"][7, 7] += 1e-3
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.embed_tokens\.weight\n.*differs from"):
        there_and_back(tmp_path, weights)
    assert list((tmp_path / "ck").iterdir()) == []


def test_stacked_experts_become_the_same_checkpoint(tmp_path):
    weights = random_hf_weights(SHAPE)
    stacked = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for layer in range(1, 5):
        experts = f"model.layers.{layer}.mlp.experts"
        def part(kind, layer_experts=experts):
            return [weights[f"{layer_experts}.{number}.{kind}_proj.weight"] for number in range(SHAPE.num_experts)]
        stacked[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(part("gate"), part("up"))])
        stacked[f"{experts}.down_proj"] = torch.stack(part("down"))
    made = [
        from_hf(write_hf_folder(tmp_path / name, SHAPE, held), tmp_path / f"ck {name}")
        for name, held in (("each", weights), ("stacked", stacked))
    ]
    assert (made[0] / "__0_0.distcp").read_bytes() == (made[1] / "__0_0.distcp").read_bytes()


FP8_SHAPE = tiny_shape(hidden_size=256, head_dim=64, num_attention_heads=4, dense_ffn_size=320, expert_ffn_size=128)


def test_an_export_in_fp8_is_what_quantising_the_tensors_gives_and_reads_back(tmp_path):
    weights = in_bfloat16(random_hf_weights(FP8_SHAPE))
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", FP8_SHAPE, weights, dtype="bfloat16"), tmp_path / "ck")
    to_hf(checkpoint, tmp_path / "out", fp8=True, max_shard_bytes=300_000)
    plan = fp8_plan(FP8_SHAPE)
    expected = dict(fp8_tensors(weights.items(), plan))
    found = HFFolder(tmp_path / "out")
    for name in weights:
        assert torch.equal(found.place(name).read().view(torch.uint8), expected[name].view(torch.uint8)), name
        if name in plan.quantised:
            assert torch.equal(found.scale_place(name).read(), expected[scale_name(name)]), name
    assert len(plan.quantised) > 100 and found.params == "bf16"
    read = {name: found.get(name) for name in found.names}
    again = from_hf(tmp_path / "out", tmp_path / "again")
    to_hf(again, tmp_path / "plain")
    assert differing(tensors(tmp_path / "plain"), read) == []
    to_hf(again, tmp_path / "fp8 again", fp8=True)
    assert differing(tensors(tmp_path / "fp8 again"), tensors(tmp_path / "out")) == []


def cut_anew(checkpoint: Path, out: Path, chance: random.Random) -> Path:
    """The same tensors in other chunks: cut at random places along every axis, in several files, as no layout ever would."""
    out.mkdir(parents=True)
    stored = {}
    for key, tensor in torch_dist.tensors(checkpoint).items():
        whole = torch.full(tensor.shape, float("nan"), dtype=tensor.dtype)
        for chunk in tensor.chunks:
            path = checkpoint / chunk.file
            data = path.read_bytes()[torch_dist.data_offset(checkpoint, chunk) :][: math.prod(chunk.sizes) * chunk.dtype.itemsize]
            part = torch.frombuffer(bytearray(data), dtype=chunk.dtype).reshape(chunk.sizes)
            whole[tuple(slice(first, first + size) for first, size in zip(chunk.start, chunk.sizes))] = part
        boxes = [(tuple(0 for _ in whole.shape), tuple(whole.shape))]
        for _ in range(chance.randint(0, 4)):
            start, sizes = boxes.pop(chance.randrange(len(boxes)))
            axis = chance.randrange(len(sizes))
            at = chance.randint(0, sizes[axis])
            if 0 < at < sizes[axis]:
                after = tuple(first + at * (axis == number) for number, first in enumerate(start))
                boxes += [(start, (*sizes[:axis], at, *sizes[axis + 1 :])), (after, (*sizes[:axis], sizes[axis] - at, *sizes[axis + 1 :]))]
            else:
                boxes.append((start, sizes))
        chance.shuffle(boxes)
        chunks = []
        for start, sizes in boxes:
            file = f"__{chance.randrange(3)}_0.distcp"
            part = whole[tuple(slice(first, first + size) for first, size in zip(start, sizes))].clone()
            with (out / file).open("ab") as target:
                begin = target.tell()
                torch.save(part, target)
                chunks.append(Item(key, file, begin, target.tell() - begin, tensor.dtype, start, sizes))
        stored[key] = Stored(tensor.dtype, tuple(whole.shape), tuple(chunks))
    torch_dist.write_metadata(out, stored)
    told = manifest.read_manifest(checkpoint)
    write_json(out / "manifest.json", told | {"files": manifest.digest_files(out)})
    return out


@pytest.mark.parametrize("seed", range(4))
def test_any_chunks_along_any_axis_give_the_same_export(tmp_path, seed):
    weights = in_bfloat16(random_hf_weights(SHAPE))
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", SHAPE, weights, dtype="bfloat16"), tmp_path / "ck")
    to_hf(cut_anew(checkpoint, tmp_path / "cut", random.Random(seed)), tmp_path / "out")
    assert differing(tensors(tmp_path / "out"), weights) == []


@pytest.mark.parametrize("name", SHAPES)
def test_the_arrangement_of_rows_is_what_the_transforms_do(name):
    shape = SHAPES[name]
    weights = random_hf_weights(shape)
    for row in rows(shape):
        about = arrangement(row, shape, hf_shapes(shape))
        fused = row.transform.to_megatron([weights[name] for name in row.names(range(shape.num_experts))], shape)
        assert about.shape == tuple(fused.shape), row.megatron
        for expert in [None] if about.experts is None else range(about.experts):
            matrix, names = fused if expert is None else fused[expert], row.names([expert])
            for run in about.runs:
                part = weights[names[run.part]][run.part_row : run.part_row + run.count]
                assert torch.equal(matrix[run.row : run.row + run.count], part), row.megatron


def test_the_writer_of_live_weights_and_the_converter_write_the_same_bytes(tmp_path):
    """Weight sync writes from memory, to_hf from a checkpoint: a reader cannot tell them apart."""
    weights = random_hf_weights(SHAPE)
    live = tmp_path / "live"
    write_folder(live, ((name, weights[name]) for name in hf_names(SHAPE)), SHAPE, rotary_base=10_000, max_shard_bytes=200_000)
    to_hf(from_hf(live, tmp_path / "ck"), tmp_path / "out", max_shard_bytes=200_000)
    assert differing(tensors(tmp_path / "out"), tensors(live)) == []
    for file in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / file).read_bytes() == (live / file).read_bytes()
