"""Each distinct rank of a layout, built by megatron on the meta device: the child process of glm.plan.memory.

Ranks of one pipeline stage hold tensors of the same shapes: heads, vocabulary and experts divide (glm.recipe.check), and where
megatron pads, it pads on every rank. So one rank a stage is built, and what differs inside a stage, which rank keeps the
optimizer state of which parameter, is computed for all of them. torch's fake process group answers for the other ranks.

Reads a JSON list of recipes on stdin, writes a JSON list of lists of StageStates on stdout.
"""

import dataclasses
import json
import sys

import torch
import torch.distributed as dist

from glm.plan.activations import Chunk
from glm.plan.memory import StageStates
from glm.recipe.schema import RECIPE_OF_MAIN, ModelStageRecipe


def build_stages(recipe: ModelStageRecipe) -> list[StageStates]:
    """The pipeline stages of ``recipe`` in order. The host platform must be active; no process group may be."""
    per_stage = recipe.world_size // recipe.layout.pp
    return [build_rank(recipe, stage * per_stage) for stage in range(recipe.layout.pp)]


def build_rank(recipe: ModelStageRecipe, rank: int) -> StageStates:
    """The stage of one rank, from that rank's own model."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from glm.model.build import build_chunks
    from glm.model.chunks import named_parameters
    from glm.model.config import stage_config
    from glm.runtime import divide_ranks

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=recipe.world_size)
    try:
        divide_ranks(recipe.layout, gloo=False)
        chunks = build_chunks(stage_config(recipe), recipe.model, rotary_base=recipe.rotary_base, device=torch.device("meta"))
        return measure(recipe, chunks, named_parameters(chunks), parallel_state.get_pipeline_model_parallel_rank())
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def measure(recipe: ModelStageRecipe, chunks: list, named: list[tuple[str, torch.nn.Parameter]], pipeline_rank: int) -> StageStates:
    """What a rank holds whose model chunks are ``chunks``; on any device, with its process groups there."""
    from glm.optim.build import BUCKET_ELEMENTS, assign_owners, cost, fused_of, with_rules
    from glm.optim.muon import CACHED_ELEMENTS
    from glm.optim.param_groups import param_groups
    from glm.optim.placement import placement

    layout, shape = recipe.layout, recipe.model
    stepped = with_rules(param_groups(named, recipe.optimizer))
    places = {parameter: placement(parameter) for _, parameter, _ in stepped}
    fused = fused_of(recipe.optimizer, shape)
    owner = assign_owners(stepped, places, recipe.optimizer, fused)
    costs = {item[1]: cost(item, places[item[1]], recipe.optimizer, fused) for item in stepped}
    held = _on_each_rank(recipe, {parameter: one.bytes for parameter, one in costs.items()}, owner)
    shards = {parameter: place.cut.group.size() if place.cut else 1 for parameter, place in places.items()}
    worked = _on_each_rank(recipe, {parameter: one.flops // shards[parameter] for parameter, one in costs.items()}, owner)
    sizes = [parameter.numel() for _, parameter, rule in stepped if rule == "muon"]
    bucket = max([min(BUCKET_ELEMENTS, sum(sizes)), *sizes])    # nothing under AdamW alone
    cut = layout.tp > 1 or layout.etp > 1
    largest = max((parameter.shape[-2:].numel() for _, parameter, rule in stepped if rule == "muon"), default=0)
    at_once = min(bucket, max(CACHED_ELEMENTS, largest)) if recipe.platform == "host" and not cut else bucket
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers()]
    return StageStates(
        pipeline_rank=pipeline_rank,
        ranks=recipe.world_size // layout.pp,
        chunks=tuple(_describe(chunk) for chunk in chunks),
        parameters=sum(parameter.numel() for _, parameter in named),
        parameter_bytes=sum(tensor.numel() * tensor.element_size() for tensor in [*(parameter for _, parameter in named), *buffers]),
        gradient_bytes=4 * sum(parameter.numel() for _, parameter, _ in stepped),
        largest_gradient_bytes=max((parameter.numel() * parameter.element_size() for _, parameter, _ in stepped), default=0),
        optimizer_bytes=max(held),
        least_optimizer_bytes=min(held),
        muon_flops=max(worked),
        step_bytes=4 * (3 * bucket + (10 if cut else 6) * at_once),
    )


def _on_each_rank(recipe: ModelStageRecipe, sizes: dict[torch.nn.Parameter, int], owner: dict[torch.nn.Parameter, int]) -> list[int]:
    """``sizes`` (bytes of state, operations) of what each rank of the stage owns. Owners count the copies of a parameter; a rank's number among the copies follows
    from megatron's order of ranks, tensor-parallel ones next to each other, then context- or expert-parallel, then data-parallel."""
    layout, ranks = recipe.layout, recipe.world_size // recipe.layout.pp
    dense, experts = layout.tp, layout.ep * layout.etp    # ranks that hold different parts
    held = {False: [0] * (ranks // dense), True: [0] * (ranks // experts)}
    for parameter, size in sizes.items():
        held[getattr(parameter, "is_stacked_expert", False)][owner[parameter]] += size
    return [held[False][rank // dense] + held[True][rank // experts] for rank in range(ranks)]


def _describe(chunk: torch.nn.Module) -> Chunk:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    experts = [isinstance(layer.mlp, MoELayer) for layer in chunk.decoder.layers]
    return Chunk(
        dense_layers=experts.count(False), expert_layers=experts.count(True), embedding=chunk.pre_process, head=chunk.post_process,
        mtp_layers=len(chunk.mtp.layers) if chunk.mtp_process else 0,
    )


def main() -> None:
    from glm.platform import activate

    activate("host")    # shapes do not depend on the device, and a machine without a GPU must do
    recipes = [RECIPE_OF_MAIN[values["main"]].model_validate(values) for values in json.load(sys.stdin)]
    json.dump([[dataclasses.asdict(stage) for stage in build_stages(recipe)] for recipe in recipes], sys.stdout)


if __name__ == "__main__":
    main()
