"""A poisoned batch: the step is skipped and recorded, resumes exactly, and too many of them send the stage back."""

import json

import pytest
import torch

from glm.errors import NumericsError, PlatformError
from tests.faults.stage import ROWS, STAGE, TWO_RANKS, copy_of, lines, numbers, run, weights
from tests.train.test_trainer import batch, step, trainer  # activates the host platform


def state_of(one) -> dict[str, torch.Tensor]:
    from glm.model.chunks import named_parameters

    state = {name: parameter for name, parameter in named_parameters(one.chunks)}
    for name, router in one.routers:
        state |= {f"{name} bias": router.expert_bias, f"{name} counts": router.local_tokens_per_expert}
    state |= {f"{one.optimizer.names[parameter]} {kind}": tensor for parameter, kind, tensor in one.optimizer._state()}
    return {name: tensor.detach().clone() for name, tensor in state.items()} | {"steps": torch.tensor(one.optimizer.adamw_steps)}


def not_a_number(losses, batch):
    total, count = (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()
    return total * float("nan"), count.int(), {"loss": torch.stack([total.detach(), count])}


def test_a_refused_step_leaves_every_bit_and_the_next_one_is_that_of_a_model_that_never_saw_it():
    poisoned, clean = trainer(), trainer()
    for one in (poisoned, clean):
        step(one, [batch([20, 12], seed=1)])
    before = state_of(poisoned)
    refused = step(poisoned, [batch([20, 12], seed=2)], not_a_number, refusal=lambda metrics, norm: None if norm == norm else "not a number")
    assert refused.refused == "not a number"
    assert [name for name, tensor in state_of(poisoned).items() if not torch.equal(tensor, before[name])] == []
    for one in (poisoned, clean):
        step(one, [batch([20, 12], seed=3)])
    after = state_of(clean)
    assert [name for name, tensor in state_of(poisoned).items() if not torch.equal(tensor, after[name])] == []
    assert not torch.equal(after["output_layer.weight"], before["output_layer.weight"]), "nothing moves, so the comparison says nothing"


def test_without_a_guard_a_gradient_that_is_not_a_number_stops_before_anything_changes():
    one = trainer()
    before = state_of(one)
    with pytest.raises(NumericsError):
        step(one, [batch([20, 12])], not_a_number, bias_update_rate=0.0)
    assert [name for name, tensor in state_of(one).items() if not torch.equal(tensor, before[name])] == []


SPIKES = f"{STAGE}.guard={{history: 2, window: 8}}"
ONE_EACH = {"poisoned": {str(2 * ROWS + 3): "nan", str(4 * ROWS + 1): "1e4"}}
"""Step 3 gives NaN, step 5 a gradient a thousand times too large: a row is an eighth of the batch."""


@pytest.fixture(scope="module")
def skipped(undisturbed):
    folder = copy_of(undisturbed, "skipped", up_to=0)
    run(folder, SPIKES, faults=ONE_EACH)
    return folder


def test_a_nan_and_a_spike_are_skipped_and_their_data_is_recorded(skipped):
    records = lines(skipped / "stages" / STAGE / "skipped.jsonl")
    assert [record["step"] for record in records] == [3, 5]
    assert "nan" in records[0]["reason"] and "times the median" in records[1]["reason"]
    assert [record["rows"] for record in records] == [[[16, 23]], [[32, 39]]]
    assert [record["stage_tokens"] for record in records] == [[1024, 1536], [2048, 2560]]
    assert all(sum(record["sources"].values()) == ROWS and len(record["sources"]) > 1 for record in records)
    told = numbers(skipped)
    assert sorted(told) == [1, 2, 3, 4, 5, 6] and told[3][0] == "nan" and told[6][-1] == 3072, "tokens count as passed"
    biases = [told[number][3] for number in sorted(told)]
    assert biases[1] == biases[2] and biases[3] == biases[4] and biases[0] < biases[1] < biases[3], "router biases rest in a skipped step"


def test_a_run_resumed_across_skipped_steps_is_the_same_bit_for_bit(skipped, capfd):
    """Step 5 is skipped again; what it is judged by was saved with step 4. It is compared with what the first start logged."""
    again = copy_of(skipped, "again", up_to=4)
    run(again, SPIKES, faults=ONE_EACH)
    assert "not bit for bit" not in capfd.readouterr().err
    assert numbers(again) == numbers(skipped)
    assert weights(again, 6) == weights(skipped, 6) and len(weights(again, 6)) > 50
    assert lines(again / "stages" / STAGE / "skipped.jsonl") == lines(skipped / "stages" / STAGE / "skipped.jsonl")


@pytest.mark.full
@pytest.mark.parametrize("layout", [TWO_RANKS, (f"{STAGE}.launcher.ranks_per_node=2", f"{STAGE}.layout.pp=2")], ids=["two data-parallel ranks", "a pipeline"])
def test_ranks_refuse_the_same_steps_whoever_of_them_had_the_row(skipped, undisturbed, layout):
    folder = copy_of(undisturbed, f"alike_{layout[-1]}", up_to=0)
    run(folder, SPIKES, *layout, faults=ONE_EACH)
    alike, alone = (lines(one / "stages" / STAGE / "skipped.jsonl") for one in (folder, skipped))
    assert [(one["step"], one["rows"], one["sources"]) for one in alike] == [(one["step"], one["rows"], one["sources"]) for one in alone]


@pytest.mark.full
def test_too_many_skipped_steps_go_back_leave_their_data_out_and_go_on(undisturbed):
    """Steps 3 and 4 are refused: back to step 2, and rows 16 to 31 are left out. A clean run without these rows is the same."""
    folder = copy_of(undisturbed, "back", up_to=0)
    two = (f"{STAGE}.guard={{history: 2, window: 8, skip_limit: 2}}",)
    poisoned = {"poisoned": {str(2 * ROWS): "nan", str(3 * ROWS + 7): "nan", str(40 * ROWS): "nan"}}
    said = run(folder, *two, faults=poisoned)
    assert any("goes back" in line for line in said), said
    (rollback,) = json.loads((folder / "stages" / STAGE / "rollbacks.json").read_text())
    assert rollback["rows"] == [[16, 23], [24, 31]] and (rollback["from_step"], rollback["to_step"]) == (4, 2)
    told = numbers(folder)
    assert sorted(told) == [1, 2, 3, 4, 5, 6] and all(isinstance(numbers[0], float) for numbers in told.values())
    again = copy_of(folder, "back_again", up_to=4)
    run(again, *two, faults=poisoned)
    assert numbers(again) == told and weights(again, 6) == weights(folder, 6), "the rows are left out after a resume too"


@pytest.mark.full
def test_a_stage_that_went_back_too_often_stops_with_the_reason(undisturbed, capfd):
    folder = copy_of(undisturbed, "too_often", up_to=0)
    with pytest.raises(PlatformError, match="code 2"):
        run(folder, f"{STAGE}.guard={{history: 2, window: 8, skip_limit: 1, rollback_limit: 0}}", faults=ONE_EACH)
    assert "after 0 rollbacks" in capfd.readouterr().err and not (folder / "stages" / STAGE / "done.json").exists()
