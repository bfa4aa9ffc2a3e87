"""What a step tells is of the global batch: the same under every layout, and what a plain computation gives."""

import json
from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode

from glm import platform

platform.activate("host")
from glm.model.chunks import named_modules, named_parameters  # noqa: E402  (imports megatron)
from glm.model.size import training_flops_per_token  # noqa: E402
from glm.train.losses import LossByPart, next_token_loss, position_bands  # noqa: E402
from glm.train.metrics import StepMetrics, by_part  # noqa: E402
from glm.train.parts import PARTS, layer_of, part_of  # noqa: E402
from glm.train.plan import Progress, plan_step  # noqa: E402
from tests.layout.cases import Case  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.train.observing import observe  # noqa: E402
from tests.train.test_trainer import SHAPE, batch, trainer  # noqa: E402

CASES = (Case(2, packed=True), Case(2, tp=2, ep=2), Case(2, pp=2, vpp=2, packed=True), Case(2, cp=2, packed=True))
MORE_CASES = (Case(2, tp=2, packed=True), Case(2, tp=2, etp=2), Case(2, pp=2), Case(2, cp=2, ep=2))
MODEL_RATE = "train/tflops"
"""Of one rank: the only metric that knows how many there are."""


@cache
def alone(packed: bool) -> list[dict]:
    return json.loads(json.dumps(observe(Case(1, packed=packed))))


def told(cases, out) -> dict[str, list[dict]]:
    run_ranks("tests.train.observing", 2, str(out), *(json.dumps(case.as_json()) for case in cases))
    return {case.label: json.loads((out / f"{number}.json").read_text()) for number, case in enumerate(cases)}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, list[dict]]:
    return told(CASES, tmp_path_factory.mktemp("observed"))


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> dict[str, list[dict]]:
    return told(MORE_CASES, tmp_path_factory.mktemp("more"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_two_ranks_tell_what_one_tells(together, case: Case):
    compare(together, case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.label)
def test_two_ranks_divided_otherwise_tell_the_same(more, case: Case):
    compare(more, case)


def compare(together: dict[str, list[dict]], case: Case) -> None:
    for found, expected in zip(together[case.label], alone(case.packed), strict=True):
        assert found.keys() == expected.keys()
        assert found.pop("ranks") == 2 and found.pop(MODEL_RATE) * 2 == pytest.approx(expected[MODEL_RATE])
        for name, value in found.items():
            assert flat(value) == pytest.approx(flat(expected[name]), rel=2e-4, abs=1e-6), name


def flat(value) -> list[float]:
    """Numbers of nested lists in order; -1 where a layer has none."""
    if isinstance(value, list):
        return [number for one in value for number in flat(one)]
    return [-1.0 if value is None else float(value)]


def test_everything_that_is_promised_is_told():
    told = alone(True)[0]
    layers, with_experts = SHAPE.num_layers + 1, SHAPE.num_layers - SHAPE.num_dense_layers + 1
    assert len(told["attention/max_logit"]) == len(told["grad/by_layer"]) == len(told["update/by_layer/attention"]) == layers
    assert len(told["balance/max_violation"]) == len(told["balance/load"]) == len(told["balance/bias_low"]) == with_experts
    assert {f"grad/norm/{part}" for part in PARTS} | {f"update/rms/{part}" for part in PARTS} <= told.keys()
    assert told["update/by_layer/experts"][0] is None, "the first layer is dense"


def source_batch(documents: list[int], sources: list[int], seed: int = 0):
    made = batch(documents, seed)
    made.extra["source"] = torch.repeat_interleave(torch.tensor(sources), torch.tensor(documents))[None]
    return made


def test_sources_and_bands_of_positions_add_up_to_the_loss():
    one = trainer()
    outcome = one.step(
        [source_batch([20, 12], [0, 1]), source_batch([30], [1], seed=1)], LossByPart(["web", "code"], 32), lr=0.0, mtp_weight=0.3,
        bias_update_rate=0.0,
    )
    sums = outcome.sums
    assert outcome.sums["source/web"][1] == 20 and sums["source/code"][1] == 42
    for kind in ("source", "position"):
        parts = [pair for name, pair in sums.items() if name.startswith(kind)]
        assert [sum(column) for column in zip(*parts)] == pytest.approx(sums["loss"])
    assert {name: count for name, (_, count) in sums.items() if name.startswith("position/")} == {
        "position/4": 12, "position/8": 12, "position/16": 4 + 8 + 8, "position/32": 4 + 14}
    assert sums["source/web"][0] == pytest.approx(token_losses_of(one, source_batch([20, 12], [0, 1]))[0, :20].sum().item(), rel=1e-5)


def token_losses_of(one, made) -> torch.Tensor:
    with torch.no_grad():
        return one.chunks[0](input_ids=made.token_ids, position_ids=made.position_ids, attention_mask=None, labels=made.labels,
                             packed_seq_params=made.documents)


def test_a_source_without_a_token_is_not_told():
    one = trainer()
    outcome = one.step([source_batch([20], [1])], LossByPart(["web", "code"], 32), lr=0.0, mtp_weight=0.0, bias_update_rate=0.0)
    assert {name for name in by_part(outcome.sums) if name.startswith("source/")} == {"source/loss/code", "source/tokens/code"}


@pytest.mark.parametrize(("length", "ends"), [(64, [4, 8, 16, 32, 64]), (131_072, [4096, 8192, 16384, 32768, 65536, 131072]), (3, [3])])
def test_bands_are_halves_of_the_length(length, ends):
    assert position_bands(length) == ends


def test_the_mtp_layers_guesses_are_those_of_its_logits():
    one, made = trainer(), batch([20, 12])
    heads = []
    (mtp,) = [module for name, module in named_modules(one.chunks) if name == "mtp"]
    handle = mtp.register_forward_hook(lambda module, inputs, output: heads.append(output.chunk(2, dim=0)[1]))
    observed = one.step([made], next_token_loss, lr=0.0, mtp_weight=0.3, bias_update_rate=0.0).observed
    handle.remove()
    logits = heads[0].transpose(0, 1) @ one.chunks[0].output_layer.weight.t()
    mask, labels = made.documents.mtp_mask.bool(), made.documents.mtp_labels
    assert mask.sum() == 30
    assert observed.mtp_accuracy == pytest.approx((logits.argmax(-1) == labels)[mask].float().mean().item())
    chosen = logits.softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert observed.mtp_probability == pytest.approx(chosen[mask].mean().item(), rel=1e-5)


def test_a_head_that_is_always_right_is_told_so():
    """The label is replaced by the first choice: every guess is a hit, at random labels next to none is."""
    one, made = trainer(), batch([20, 12])
    weight = one.chunks[0].output_layer.weight
    heads = []
    (mtp,) = [module for name, module in named_modules(one.chunks) if name == "mtp"]
    handle = mtp.register_forward_hook(lambda module, inputs, output: heads.append(output.chunk(2, dim=0)[1].detach()))
    for expected in (None, 1.0):
        found = one.step([made], next_token_loss, lr=0.0, mtp_weight=0.3, bias_update_rate=0.0).observed.mtp_accuracy
        assert found < 0.2 if expected is None else found == expected
        made.documents.mtp_labels = (heads[-1].transpose(0, 1) @ weight.t()).argmax(-1)
    handle.remove()


def test_gradients_of_the_parts_add_up_to_the_norm_that_is_clipped():
    outcome = trainer().step([batch([20, 12])], next_token_loss, lr=1e-3, mtp_weight=0.3, bias_update_rate=0.0, detailed=True)
    detail = outcome.observed.detail
    assert sum(norm**2 for norm in detail.grad_norms().values()) ** 0.5 == pytest.approx(outcome.grad_norm, rel=1e-9)
    assert all(norm > 0 for norm in detail.grad_norms_by_layer())


class Transfers(TorchFunctionMode):
    """Calls that, on CUDA, copy between host and device: what is made of Python's numbers, and what is moved."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name = getattr(function, "__name__", "")
        if name in ("tensor", "new_tensor", "to", "cpu", "item"):
            self.seen.append(name)
        return function(*arguments, **(keywords or {}))


def test_the_change_of_all_parts_and_layers_is_told_by_one_copy():
    one, seen = trainer(), Transfers()
    measure = one.observer.after_update

    def watched(lr: float) -> None:
        with seen:
            measure(lr)

    one.observer.after_update = watched
    one.step([batch([20, 12])], next_token_loss, lr=1e-2, mtp_weight=0.3, bias_update_rate=0.0, detailed=True)
    assert seen.seen == ["to"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_update_rms_is_that_of_the_change_of_the_weights(precision):
    one = trainer(precision={"params": precision})
    before = {param: master.clone() for param, master in one.optimizer.masters.items()}
    outcome = one.step([batch([20, 12])], next_token_loss, lr=1e-2, mtp_weight=0.3, bias_update_rate=0.0, detailed=True)
    changes = {}
    for name, param in named_parameters(one.chunks):
        change = (one.optimizer.masters[param] - before[param]).flatten() / 1e-2
        changes.setdefault(part_of(name, param.dim()), []).append(change)
        changes.setdefault((part_of(name, param.dim()), layer_of(name, SHAPE.num_layers)), []).append(change)
    expected = {key: torch.cat(some).double().square().mean().sqrt().item() for key, some in changes.items()}
    found = outcome.observed.detail.update_rms()
    assert found == pytest.approx({part: expected[part] for part in PARTS}, rel=1e-5)
    for part, layers in outcome.observed.detail.update_rms_by_layer().items():
        for layer, rms in enumerate(layers):
            assert (rms or 0.0) == pytest.approx(expected.get((part, layer), 0.0), rel=1e-5)


def test_every_parameter_has_a_part_and_a_layer():
    found = {name: (part_of(name, param.dim()), layer_of(name, SHAPE.num_layers)) for name, param in named_parameters(trainer().chunks)}
    assert found["embedding.word_embeddings.weight"] == ("embedding", 5) and found["output_layer.weight"] == ("output", 5)
    assert found["decoder.layers.2.mlp.experts.weight1"] == ("experts", 2)
    assert found["decoder.layers.2.mlp.shared_experts.linear_fc1.weight"] == ("dense", 2)
    assert found["decoder.layers.0.mlp.linear_fc1.weight"] == ("dense", 0)
    assert found["decoder.layers.1.mlp.router.weight"] == ("router", 1)
    assert found["decoder.layers.3.self_attention.linear_qkv.weight"] == ("attention", 3)
    assert found["decoder.layers.3.self_attention.linear_qkv.bias"] == ("norms", 3)
    assert found["mtp.layers.0.eh_proj.weight"] == ("dense", 4)
    assert {part for part, _ in found.values()} == set(PARTS)


def test_an_expert_without_a_token_for_long_is_dead_and_comes_back_to_life():
    one = trainer(logging={"dead_after_steps": 2})
    told = StepMetrics(one.recipe)
    plan = plan_step(one.recipe, Progress())

    def dead(bias: float) -> list[int]:
        for _, router in one.routers:
            router.expert_bias[:3] = bias
        outcome = one.step([batch([20, 12])], next_token_loss, lr=0.0, mtp_weight=0.3, bias_update_rate=0.0)
        assert (torch.tensor(outcome.load)[:, :3].sum() == 0) == (bias < 0)
        return told(plan, Progress().after(plan), outcome, 1.0).get("balance/dead_by_layer", [])

    assert [dead(-9.0), dead(-9.0), dead(-9.0)] == [[], [3, 3, 3, 3], [3, 3, 3, 3]]
    assert [dead(9.0), dead(9.0)] == [[], [5, 5, 5, 5]], "the first three are back, and then the others have been without for two steps"


def test_mfu_counts_what_packed_documents_attend_to():
    one = trainer(device={"peak_tflops": 2.0})
    outcome = one.step([batch([20, 12])], next_token_loss, lr=0.0, mtp_weight=0.3, bias_update_rate=0.0)
    assert outcome.tokens == 32 and outcome.attended == pytest.approx((20 * 21 / 2 + 12 * 13 / 2) / 32)
    plan = plan_step(one.recipe, Progress())
    told = StepMetrics(one.recipe)(plan, Progress().after(plan), outcome, seconds=0.5)
    expected = 32 * training_flops_per_token(SHAPE, 2 * outcome.attended) / 0.5 / 1e12
    assert told["train/tflops"] == pytest.approx(expected) and told["train/mfu"] == pytest.approx(expected / 2)


def test_steps_between_measure_nothing_that_costs():
    one = trainer()
    seen = [one.step([batch([20])], next_token_loss, lr=0.0, mtp_weight=0.3, bias_update_rate=0.0, detailed=on).observed.detail is not None
            for on in (True, False)]
    assert seen == [True, False]
    assert all(watch.largest is None and not watch.on for _, watch in one.observer.watches) and one.observer.watches
