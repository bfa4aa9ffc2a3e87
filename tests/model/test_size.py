"""Parameter counts against an independent table of blocks, to the parameter."""

from pathlib import Path

import pytest

from glm.model.size import blocks, kv_bytes_per_token, parameters, training_flops_per_token
from glm.recipe.compose import load_run

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


@pytest.mark.parametrize("model, body, body_active, millions, rounded", [
    (LARGE, 351_245_917_184, 32_080_354_304, (356_786, 34_034), {
        "body": (351.246, 32.080), "body and MTP": (355.234, 32.482), "body, embedding and head": (352.798, 33.632),
        "body and head": (352.022, 32.856), "everything": (356.786, 34.034)}),
    (AIR, 105_610_727_424, 12_182_605_824, (109_227, 13_723), {
        "body": (105.611, 12.183), "body and MTP": (107.986, 12.481), "body, embedding and head": (106.852, 13.424),
        "body and head": (106.231, 12.803), "everything": (109.227, 13.723)}),
])
def test_totals_are_those_of_the_report_under_every_way_to_count(model, body, body_active, millions, rounded):
    counted = parameters(model)
    assert (counted.body, counted.body_active) == (body, body_active)
    assert (round(counted.total / 1e6), round(counted.active / 1e6)) == millions
    assert {name: (round(total / 1e9, 3), round(active / 1e9, 3)) for name, (total, active) in counted.conventions().items()} == rounded


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
    longer = training_flops_per_token(AIR, 8192) - training_flops_per_token(AIR, 4096)
    assert longer == 6 * 47 * 96 * 128 * 4096
