"""SGLang's own loader, target and draft, on folders in FP8: what it holds is what this suite reads from them.

Exercised are SGLang's configuration, create_weights and weight loaders of every layer, on one rank. Not exercised are its FP8
kernels, which need a GPU, nor tensor parallelism.
"""

import subprocess
import sys

import pytest
import torch

from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.inference.server import server_environment
from glm.weights.fp8 import Fp8Plan, fp8_plan, fp8_tensors
from glm.weights.hf_reader import HFFolder
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder

WHOLE = tiny_shape(num_layers=2, hidden_size=128, dense_ffn_size=256, expert_ffn_size=128, head_dim=64, num_experts=4, init_std=0.1)
SHAPES = {
    "whole blocks": WHOLE,
    "a dense layer as Air's": WHOLE.model_copy(update={"dense_ffn_size": 320}),
    "narrow experts": WHOLE.model_copy(update={"expert_ffn_size": 64}),
    "half a key/value block": WHOLE.model_copy(update={"num_query_groups": 1}),
}

REFUSED = ["a dense layer as Air's", "narrow experts"]


def bf16(shape):
    return {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in random_hf_weights(shape).items()}


def exported(root, shape):
    """By this suite's converters: bfloat16 folder, checkpoint, FP8 folder."""
    checkpoint = from_hf(write_hf_folder(root / "hf", shape, bf16(shape), dtype="bfloat16"), root / "checkpoints")
    to_hf(checkpoint, root / "fp8", fp8=True)
    return root / "fp8"


def write(folder, shape, plan):
    return write_hf_folder(folder, shape, dict(fp8_tensors(bf16(shape).items(), plan)), dtype="bfloat16", quantization_config=plan.config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One for each shape, and two in which also what does not divide is quantised."""
    root, everything = tmp_path_factory.mktemp("fp8"), Fp8Plan(fp8_plan(WHOLE).quantised, kept=())
    made = {name: exported(root / name.replace("/", " "), shape) for name, shape in SHAPES.items()}
    return made | {f"all of {name}": write(root / f"all of {name}", SHAPES[name], everything) for name in REFUSED}


@pytest.fixture(scope="module")
def outcomes(folders, tmp_path_factory):
    """{name of the folder: {parameter: tensor}, or the words with which SGLang refused it}."""
    out = tmp_path_factory.mktemp("held") / "held.pt"
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.weights.sglang_load", str(out), *map(str, folders.values())],
                          env=server_environment("host"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    held = torch.load(out, weights_only=True)
    return {name: held[str(folder)] for name, folder in folders.items()}


def as_sglang_fuses(read, shape):
    """{SGLang's parameter: values} of the folder, fused here by hand; the draft's from the MTP layer."""
    found = {f"target.{name}": read.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")}
    for layer in range(shape.num_layers + 1):
        hf, mtp = f"model.layers.{layer}.", layer == shape.num_layers
        ours = "draft.model.decoder." if mtp else f"target.{hf}"
        own = {name.removeprefix(hf): name for name in read.names if name.startswith(hf)}
        for short, name in own.items():
            if ".experts." in short or any(part in short for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                continue
            special = mtp and short.split(".")[0] in ("enorm", "hnorm", "eh_proj", "shared_head")
            found[("draft.model." if special else ours) + short] = read.get(name)
        for kind in ("weight", "bias"):
            found[f"{ours}self_attn.qkv_proj.{kind}"] = torch.cat([read.get(f"{hf}self_attn.{x}_proj.{kind}") for x in "qkv"])
        for mlp in ("mlp", "mlp.shared_experts"):
            if f"{mlp}.gate_proj.weight" in own:
                found[f"{ours}{mlp}.gate_up_proj.weight"] = torch.cat([read.get(f"{hf}{mlp}.{x}_proj.weight") for x in ("gate", "up")])
        if layer >= shape.num_dense_layers:
            def experts(kind):
                return torch.stack([read.get(f"{hf}mlp.experts.{e}.{kind}_proj.weight") for e in range(shape.num_experts)])

            found[f"{ours}mlp.experts.w13_weight"] = torch.cat([experts("gate"), experts("up")], dim=1)
            found[f"{ours}mlp.experts.w2_weight"] = experts("down")
    return found


def dequantised(held):
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    scales = {name.removesuffix("_scale_inv"): value for name, value in held.items() if name.endswith("_scale_inv")}
    return {
        name: block_quant_dequant(value, scales[name], [128, 128], torch.bfloat16) if name in scales else value
        for name, value in held.items() if not name.endswith("_scale_inv")
    }


@pytest.mark.parametrize("name", SHAPES)
def test_sglang_holds_what_this_suite_reads(folders, outcomes, name):
    held = outcomes[name]
    fp8 = {name for name, value in held.items() if value.dtype is torch.float8_e4m3fn}
    assert fp8 and all(value.dtype is torch.float32 for name, value in held.items() if name.endswith(("_scale_inv", "correction_bias")))
    found, expected = dequantised(held), as_sglang_fuses(HFFolder(folders[name]), SHAPES[name])
    ignored = {"draft.model.embed_tokens.weight", "draft.lm_head.weight"}  # the target's are put in their place
    assert found.keys() - ignored == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name].to(value.dtype), value)] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_kept_would_be_refused_by_sglang(outcomes, name):
    assert "is not divisible by weight quantization block_n = 128" in outcomes[f"all of {name}"]
