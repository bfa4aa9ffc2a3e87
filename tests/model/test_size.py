"""Parameter counts against an independent table of blocks, to the parameter."""

from pathlib import Path

import pytest
import torch

from glm.model.size import blocks, kv_bytes_per_token, parameters, training_flops_per_token
from glm.recipe.compose import load_run
from glm.weights.hf_config import config_json

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
LARGE = load_run(CONFIGS / "355b.yaml").stages["chat"].model
AIR = load_run(CONFIGS / "air.yaml").stages["chat"].model
TINY = load_run(CONFIGS / "tiny.yaml").stages["chat"].model


@pytest.mark.parametrize("model, attention, dense, expert, router, layer, active, outer, mtp, mtp_active", [
    (LARGE, 136_314_880 + 14_336 + 256, 325_083_392, 23_592_960, 819_200, 3_935_625_472, 349_495_552, 775_946_240, 3_988_069_632, 401_939_712),
    (AIR, 109_051_904 + 14_336, 243_554_304, 17_301_504, 524_288, 2_341_492_736, 265_312_256, 620_756_992, 2_375_059_456, 298_878_976),
])
def test_every_block_has_the_size_computed_by_hand(model, attention, dense, expert, router, layer, active, outer, mtp, mtp_active):
    block = blocks(model)
    assert (block.attention, block.dense_layer, block.expert, block.router) == (attention, dense, expert, router)
    assert block.expert_layer(model.num_experts + 1) == layer and block.expert_layer(8 + 1) == active
    counted = parameters(model)
    assert (counted.embedding, counted.head, counted.mtp, counted.mtp_active) == (outer, outer, mtp, mtp_active)


WAYS = ("body", "body and MTP", "body, embedding and head", "body and head", "everything", "everything, and MTP's copies of embedding and head")


@pytest.mark.parametrize("model, totals, actives, bias", [
    (LARGE, (351_245_922_304, 355_233_991_936, 352_797_814_784, 352_021_868_544, 356_785_884_416, 358_337_776_896),
     (32_080_359_424, 32_482_299_136, 33_632_251_904, 32_856_305_664, 34_034_191_616, 34_034_191_616), 14_400),
    (AIR, (105_610_731_520, 107_985_790_976, 106_852_245_504, 106_231_488_512, 109_227_304_960, 110_468_818_944),
     (12_182_609_920, 12_481_488_896, 13_424_123_904, 12_803_366_912, 13_723_002_880, 13_723_002_880), 5_888),
])
def test_every_way_to_count_gives_the_number_computed_by_hand(model, totals, actives, bias):
    counted = parameters(model)
    assert counted.conventions() == dict(zip(WAYS, zip(totals, actives), strict=True))
    assert (counted.total, counted.total_without_mtp, counted.active, counted.router_bias) == (totals[4], totals[2], actives[4], bias)


@pytest.mark.parametrize("model", [LARGE, AIR, TINY], ids=["355b", "air", "tiny"])
def test_transformers_own_model_has_as_many_parameters_without_mtp(model):
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    with torch.device("meta"):
        theirs = Glm4MoeForCausalLM(Glm4MoeConfig(**config_json(model, rotary_base=10_000, params="bf16")))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters(model).total_without_mtp


def test_a_total_is_the_sum_of_a_name_by_name_listing_of_the_tiny_model():
    hidden, query, key, experts = 128, 4 * 32, 2 * 32, 8
    attention = [hidden * query, query, hidden * key, key, hidden * key, key, query * hidden, 32, 32]
    norms = [hidden, hidden]
    expert = [96 * hidden, 96 * hidden, hidden * 96]
    layer = attention + norms + [experts * hidden] + expert * (experts + 1)
    dense = attention + norms + [384 * hidden, 384 * hidden, hidden * 384]
    mtp = layer + [hidden * 2 * hidden, hidden, hidden, hidden]
    everything = dense + 3 * layer + mtp + [hidden] + 2 * [2048 * hidden]
    assert parameters(TINY).total == sum(everything) == 2_284_864


def test_keys_and_values_of_a_token_are_368_and_184_kib_in_bf16():
    assert (kv_bytes_per_token(LARGE), kv_bytes_per_token(AIR)) == (368 * 1024, 184 * 1024)
    assert kv_bytes_per_token(TINY, 4) == 4 * 2 * 2 * 32 * 4


def test_flops_are_six_per_active_parameter_and_grow_with_length_by_the_scores():
    active = parameters(LARGE)
    matrices = active.body_active + active.mtp_active + 2 * active.head
    assert training_flops_per_token(LARGE, 4096) == 6 * matrices + 6 * 93 * 96 * 128 * 4096
    assert [round(training_flops_per_token(LARGE, length) / 1e9) for length in (4096, 32_768, 131_072)] == [232, 429, 1103]
    assert [round(training_flops_per_token(AIR, length) / 1e9, 1) for length in (4096, 32_768, 131_072)] == [96.5, 195.9, 536.5]
    longer = training_flops_per_token(AIR, 8192) - training_flops_per_token(AIR, 4096)
    assert longer == 6 * 47 * 96 * 128 * 4096
