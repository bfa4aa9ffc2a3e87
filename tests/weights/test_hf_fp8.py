"""FP8 blocks: the values SGLang and transformers read, bounds on what is lost, and folders of them."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from glm.errors import CheckpointError, NumericsError
from glm.weights.fp8 import FP8, dequantise, fp8_plan, fp8_tensors, quantise, scale_name, scale_shape
from glm.weights.hf_config import model_section
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import hf_names
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder

SHAPES = [(256, 384), (128, 128), (300, 200), (1, 1), (129, 127), (64, 500)]
FITS = tiny_shape(hidden_size=128, dense_ffn_size=256, expert_ffn_size=128, head_dim=64, num_experts=4, init_std=0.1)
"""Every matrix divides into blocks: 4 heads of 64, 2 key/value heads."""


def random(shape, seed=0, dtype=torch.float32):
    """Of sizes from 1e-6 to 10, different in each block and in each element."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(shape, generator=generator) * 4 - 3) * 10 ** (torch.rand(scale_shape(shape), generator=generator) * 3 - 3
        ).repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def by_element(scales, shape):
    """The factor of each element, written another way than the code under test."""
    rows, columns = torch.arange(shape[0]) // 128, torch.arange(shape[1]) // 128
    return scales[rows][:, columns]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_lost_stays_below_half_a_step(shape, dtype):
    weight = random(shape, dtype=dtype)
    values, scales = quantise(weight)
    assert values.dtype is FP8 and values.shape == shape and scales.dtype is torch.float32 and scales.shape == scale_shape(shape)
    error = (dequantise(values, scales, torch.float32) - weight.float()).abs()
    factor = by_element(scales, shape)
    # 3 mantissa bits: half a step is 2^-4 of the power of two below the value; below 2^-6 the steps are 2^-9
    bound = torch.maximum(weight.float().abs() * 2**-4, factor * 2**-10) * (1 + 1e-6)
    assert (error <= bound).all()
    assert (error <= factor * 448 / 28 * (1 + 1e-6)).all(), "half a step of 32 below 448"
    assert error.max() > 0 or weight.numel() == 1, "nothing was lost: the test sees nothing"


def test_the_factor_brings_the_largest_value_of_each_block_to_448():
    weight = random((300, 200))
    values, scales = quantise(weight)
    for i in range(3):
        for j in range(2):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert scales[i, j] == weight[block].abs().max() / 448 and values[block].float().abs().max() == 448


def test_a_block_of_zeros_stays_zero_and_has_factor_one():
    weight = random((256, 130))
    weight[:128] = 0
    weight[128:, 128:] = 0
    values, scales = quantise(weight)
    assert scales[0].tolist() == [1, 1] and scales[1, 1] == 1 and scales[1, 0] != 1
    assert torch.equal(dequantise(values, scales, torch.float32)[:128], weight[:128])


def test_the_smallest_numbers_do_not_divide_by_zero():
    weight = torch.full((2, 130), 1e-44)
    weight[:, 128:] = torch.finfo(torch.float32).tiny * 448
    values, scales = quantise(weight)
    assert values.float().isfinite().all() and (scales >= torch.finfo(torch.float32).tiny).all()
    assert torch.equal(dequantise(values, scales, torch.float32)[:, 128:], weight[:, 128:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    weight = random((200, 200))
    weight[150, 170] = bad
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.x\.weight\n.*not finite"):
        quantise(weight, "model.layers.1.x.weight")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 260), columns=st.integers(1, 260), exponent=st.integers(-30, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_again_what_was_read_gives_the_same_bytes(dtype, seed, rows, columns, exponent):
    """Holds because s = fl(a / 448): where a = 448 s is not met again exactly, it is near enough to be divided back to s."""
    weight = (random((rows, columns), seed) * 2.0**exponent).to(dtype)
    values, scales = quantise(weight)
    again, scales_again = quantise(dequantise(values, scales, dtype))
    assert torch.equal(scales, scales_again) and torch.equal(values.view(torch.uint8), again.view(torch.uint8))


def test_every_factor_made_here_is_made_again():
    """All float32 from 1 to 2 as largest values; the others differ by a power of two."""
    largest = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
    factors = largest / 448
    assert torch.equal((factors * 448) / 448, factors)
    any_number = largest
    assert not torch.equal((any_number * 448) / 448, any_number), "it holds of no other numbers than quotients"


def test_quantising_again_changes_factors_that_were_made_otherwise():
    values, scales = quantise(random((1024, 1024)))
    others = scales * (1 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(1)))
    again, scales_again = quantise(dequantise(values, others, torch.float32))
    assert not torch.equal(others, scales_again) and torch.allclose(others, scales_again, rtol=2**-22)
    assert torch.equal(values.view(torch.uint8), again.view(torch.uint8)), "a last bit of a factor moves no value"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sglang_reads_the_same_values(shape, dtype):
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    values, scales = quantise(random(shape))
    theirs = block_quant_dequant(values, scales, [128, 128], dtype)
    assert torch.equal(dequantise(values, scales, dtype), theirs)
    perturbed = scales.clone()
    perturbed[-1, -1] *= 1.01
    assert not torch.equal(dequantise(values, perturbed, dtype), theirs)


def test_transformers_reads_the_same_values_where_it_reads_them():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values, scales = quantise(random((256, 384)))
    for dtype in (torch.float32, torch.bfloat16):
        theirs = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=dtype)
        assert torch.equal(dequantise(values, scales, dtype), theirs)


def test_what_is_quantised_are_the_matrices_of_attention_and_experts():
    plan = fp8_plan(FITS)
    assert plan.kept == ()
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()) for name in plan.quantised}
    attention = {f"model.layers.self_attn.{kind}_proj.weight" for kind in "qkvo"}
    mlps = {f"model.layers.{mlp}.{kind}_proj.weight" for mlp in ("mlp", "mlp.experts", "mlp.shared_experts") for kind in ("gate", "up", "down")}
    assert kinds == attention | mlps
    assert "model.layers.4.mlp.experts.3.down_proj.weight" in plan.quantised, "the MTP layer's too"


def test_a_module_that_does_not_divide_is_kept_whole_and_named():
    air = tiny_shape(hidden_size=128, dense_ffn_size=10944, expert_ffn_size=128, head_dim=64, num_query_groups=1)
    plan = fp8_plan(air)
    mlp = [f"model.layers.0.mlp.{kind}_proj" for kind in ("down", "gate", "up")]
    fused = [f"self_attn.{kind}_proj" for kind in "kqv"]  # one key/value head of 64 is half a block
    layers = [*(f"model.layers.{layer}" for layer in range(5)), "model.decoder"]
    assert plan.kept == tuple(sorted([*mlp, *(f"{layer}.{part}" for layer in layers for part in fused)]))
    assert "model.layers.0.self_attn.o_proj.weight" in plan.quantised
    narrow = fp8_plan(tiny_shape(hidden_size=128, dense_ffn_size=256, expert_ffn_size=64))
    assert {"model.layers.1.mlp.experts", "model.decoder.mlp.experts"} <= set(narrow.kept)
    assert not any(".experts." in name for name in narrow.quantised)


def test_sglang_takes_the_config_and_skips_what_is_kept():
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    shape = tiny_shape(hidden_size=128, dense_ffn_size=192, expert_ffn_size=64, head_dim=64)
    config = Fp8Config.from_config(json.loads(json.dumps(fp8_plan(shape).config)))
    assert config.is_checkpoint_fp8_serialized and config.weight_block_size == [128, 128]
    for module, skipped in {
        "model.layers.0.mlp.gate_up_proj": True, "model.layers.0.mlp.down_proj": True, "model.layers.2.mlp.experts": True,
        "model.layers.2.mlp.shared_experts.gate_up_proj": True, "model.decoder.mlp.experts": True,
        "model.decoder.mlp.shared_experts.down_proj": True, "model.layers.0.self_attn.qkv_proj": False,
        "model.decoder.self_attn.o_proj": False, "lm_head": True,
    }.items():
        assert is_layer_skipped(module, config.ignored_layers) is skipped, module


@pytest.fixture(scope="module")
def weights():
    return {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in random_hf_weights(FITS).items()}


@pytest.fixture
def folder(tmp_path, weights):
    plan = fp8_plan(FITS)
    return write_hf_folder(tmp_path / "fp8", FITS, dict(fp8_tensors(weights.items(), plan)), dtype="bfloat16",
                           quantization_config=plan.config)


def test_a_folder_in_fp8_is_read_in_the_models_type(folder, weights):
    held = load_file(folder / "model.safetensors")
    read = HFFolder(folder)
    assert read.params == "bf16" and read.shape == FITS and sorted(read.names) == sorted(hf_names(FITS))
    for name, tensor in weights.items():
        found = read.get(name)
        assert found.dtype is tensor.dtype is read.dtype(name) and found.shape == tensor.shape
        if name in fp8_plan(FITS).quantised:
            exact = held[name].float() * by_element(held[scale_name(name)], tensor.shape)
            assert read.place(name).dtype is FP8 and torch.equal(found, exact.bfloat16()) and not torch.equal(found, tensor)
        else:
            assert read.scale_place(name) is None and torch.equal(found, tensor)


def test_stacked_experts_in_fp8_are_each_read_on_their_own(tmp_path, folder):
    tensors, E = load_file(folder / "model.safetensors"), FITS.num_experts
    expected = {name: HFFolder(folder).get(name) for name in HFFolder(folder).names}
    for layer in range(1, 5):
        prefix = f"model.layers.{layer}.mlp.experts"
        for suffix in ("", "_scale_inv"):
            kinds = [[tensors.pop(f"{prefix}.{e}.{kind}_proj.weight{suffix}").view(torch.uint8) for e in range(E)] for kind in ("gate", "up", "down")]
            dtype = torch.float32 if suffix else FP8
            tensors[f"{prefix}.gate_up_proj{suffix}"] = torch.stack([torch.cat(pair) for pair in zip(*kinds[:2])]).view(dtype)
            tensors[f"{prefix}.down_proj{suffix}"] = torch.stack(kinds[2]).view(dtype)
    read = HFFolder(write_hf_folder(tmp_path / "stacked", FITS, tensors, quantization_config=fp8_plan(FITS).config))
    assert all(torch.equal(read.get(name), tensor) for name, tensor in expected.items())


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(scale_name(Q)), r"q_proj\.weight\n.*without model\.layers\.1\.self_attn\.q_proj\.weight_scale_inv"),
    (lambda t: t.update({Q: t[Q].bfloat16()}), r"q_proj\.weight\n.*bfloat16 with"),
    (lambda t: t.update({scale_name(Q): t[scale_name(Q)][:1]}), r"q_proj\.weight_scale_inv\n.*float32 \[1, 1\]\n.*float32 \[2, 1\]"),
    (lambda t: t.update({scale_name(Q): t[scale_name(Q)].bfloat16()}), r"q_proj\.weight_scale_inv\n.*bfloat16"),
    (lambda t: t.update({scale_name("model.layers.9.x.weight"): t[scale_name(Q)].clone()}), r"model\.layers\.9\.x\.weight_scale_inv\n.*no tensor"),
    (lambda t: t.update({Q: t[Q][:-1]}), r"q_proj\.weight\n.*shape \[255, 128\]"),
])
def test_a_factor_that_is_missing_or_does_not_fit_is_named(tmp_path, folder, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        HFFolder(write_hf_folder(tmp_path / "changed", FITS, tensors, quantization_config=fp8_plan(FITS).config))


def test_fp8_that_config_json_does_not_tell_of_is_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn\n.*a quantization_config"):
        HFFolder(write_hf_folder(tmp_path / "untold", FITS, load_file(folder / "model.safetensors")))


@pytest.mark.parametrize("change", [
    {"quant_method": "compressed-tensors"}, {"weight_block_size": [1, 32]}, {"weight_block_size": None}, {"activation_scheme": "static"},
    {"fmt": "e5m2"},
])
def test_another_quantisation_is_refused_by_name(folder, change):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    with pytest.raises(CheckpointError, match=f"quantization_config\n.*{next(iter(change))}"):
        model_section(config)


def test_a_changed_factor_is_told_by_the_manifest(folder):
    from glm.checkpoint.run_folder import write_json
    from glm.weights.digest import tensor_digest

    tensors = load_file(folder / "model.safetensors")
    write_json(folder / "manifest.json", {"tensors": {name: {"sha256": tensor_digest(t)} for name, t in tensors.items()}})
    HFFolder(folder).get(Q)
    tensors[scale_name(Q)][1, 0] = torch.nextafter(tensors[scale_name(Q)][1, 0], torch.tensor(1.0))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale_inv\n.*other bytes"):
        HFFolder(folder).get(Q)
