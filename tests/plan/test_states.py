"""Bytes of parameters, gradients and optimizer state: what the planner says of ranks it does not have, and what real ranks hold."""

from pathlib import Path

import pytest

from glm import platform

platform.activate("host")
from glm.model.size import parameters  # noqa: E402
from glm.plan.memory import build_states  # noqa: E402
from glm.recipe.compose import load_run  # noqa: E402
from glm.recipe.schema import TrainRecipe  # noqa: E402
from tests.model_fixture import tiny_shape  # noqa: E402
from tests.optim.ranks import Ranks  # noqa: E402
from tests.plan.recipes import stage  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
SHAPE = tiny_shape(num_layers=7, num_dense_layers=2, dense_ffn_size=144)
LAYOUTS = [
    {}, {"ep": 2}, {"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"pp": 2, "ep": 2},
    {"pp": 2, "pipeline_layers": [5, 2]}, {"cp": 2, "ep": 4}, {"pp": 2, "tp": 2}, {"pp": 4, "ep": 1},
]


def recipe(layout: dict, **changes) -> TrainRecipe:
    return stage(SHAPE, layout=layout, launcher={"ranks_per_node": 4}, **changes)


def held(one: TrainRecipe) -> dict[str, int]:
    """Bytes of what a real trainer on this rank holds; runs on the ranks."""
    from megatron.core import parallel_state

    from glm.train.step import Trainer

    trainer = Trainer(one)
    tensors = [tensor for chunk in trainer.chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
    buffers = [buffer.grad_data for parallel in trainer.parallel for buffer in (*parallel.buffers, *parallel.expert_parallel_buffers)]
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(tensor.nbytes for tensor in tensors),
        "gradients": sum(buffer.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for _, _, tensor in trainer.optimizer._state()),
    }


@pytest.fixture(scope="module")
def cases():
    precisions = ("bf16", "fp32")
    return [recipe(layout, precision={"params": precisions[index % 2]}) for index, layout in enumerate(LAYOUTS)] + [
        recipe({"ep": 2}, optimizer={"frozen": ["embedding", "output", "router"]})
    ]


@pytest.fixture(scope="module")
def planned(cases):
    return build_states(cases)


def test_every_byte_of_state_is_there_on_real_ranks(cases, planned, tmp_path):
    ranks = Ranks(4, tmp_path)
    try:
        for one, stages in zip(cases, planned, strict=True):
            sizes = one.layout.model_dump(exclude={"pipeline_layers"}) | {"vpp": one.layout.vpp if one.layout.vpp > 1 else None}
            real = ranks(sizes, held, one)
            for states in stages:
                same = [rank for rank in real if rank["stage"] == states.pipeline_rank]
                assert len(same) == states.ranks
                assert {rank["parameters"] for rank in same} == {states.parameter_bytes}, one.layout
                assert {rank["gradients"] for rank in same} == {states.gradient_bytes}, one.layout
                found = [rank["optimizer"] for rank in same]
                assert (max(found), min(found)) == (states.optimizer_bytes, states.least_optimizer_bytes), one.layout
    finally:
        ranks.close()


def test_stages_add_up_to_the_model(cases, planned):
    """Twice the embedding where the MTP layer's stage has a copy of it."""
    whole = parameters(SHAPE)
    for one, stages in zip(cases, planned, strict=True):
        layout = one.layout
        if layout.tp == layout.ep == layout.etp == 1:
            copy = whole.embedding if layout.pp > 1 else 0
            assert sum(states.parameters for states in stages) == whole.total + copy, layout


def test_megatrons_own_model_has_as_many_parameters_as_the_formula():
    models = {name: load_run(CONFIGS / f"{name}.yaml").stages["chat"].model for name in ("355b", "air", "4b", "tiny")}
    for (name, model), (states,) in zip(models.items(), build_states([stage(model) for model in models.values()]), strict=True):
        assert states.parameters == parameters(model).total, name
        routers = model.num_layers - model.num_dense_layers + model.num_mtp_layers
        in_fp32 = routers * model.num_experts * 2    # bias and token counts
        assert states.parameter_bytes == 4 * (states.parameters + in_fp32), name
