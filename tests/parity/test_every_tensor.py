"""No tensor is silently unused: every value of a Hugging Face folder stands at exactly one place of our model, and every one
of our tensors moves what the model computes. MTP layer and router biases included.
"""

import pytest
import torch

from glm.model.chunks import named_tensors
from glm.model.router import SigmoidRouter
from glm.train.batch import plain_batch
from glm.weights.gather import load_hf_tensors
from glm.weights.name_map import hf_names
from tests.model_fixture import megatron_model, random_tokens
from tests.parity.compare import Pair, next_tokens, our_outcome
from tests.parity.shapes import QUICK


@pytest.fixture(scope="module", params=QUICK)
def pair(request, tmp_path_factory) -> Pair:
    return Pair.write(request.param, QUICK[request.param], tmp_path_factory.mktemp("model"))


class Counted(dict):
    """A dict of tensors that counts how often each was asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.asked: list[str] = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)


def numbered(weights: dict) -> tuple[dict, int]:
    """Tensors of the same shapes in which every value is another whole number, from 0 up; and how many."""
    made, count = {}, 0
    for name, tensor in weights.items():
        made[name] = torch.arange(count, count + tensor.numel(), dtype=torch.float32).view(tensor.shape)
        count += tensor.numel()
    assert count < 2**24, "float32 counts no further"
    return made, count


def test_every_value_of_a_folder_stands_at_exactly_one_place(pair):
    present = {name: tensor for name, tensor in pair.weights.items() if tensor.numel()}  # no shared expert: tensors of size 0
    assert sorted(hf_names(pair.shape)) == sorted(present)
    made, count = numbered(present)
    tensors = Counted(made)
    model = megatron_model(pair.shape)
    load_hf_tensors([model], pair.shape, tensors.__getitem__)
    assert sorted(tensors.asked) == sorted(present), "each is read once"
    held = torch.cat([tensor.flatten() for tensor in named_tensors([model]).values()])
    assert torch.equal(held.sort().values, torch.arange(count, dtype=torch.float32))


def test_every_tensor_has_a_gradient(pair):
    """Of main and MTP loss together. Only an expert that its router sent no token has none, and that is one at most."""
    model = pair.ours()
    outcome = our_outcome(model, pair.shape, next_tokens(random_tokens(pair.shape, batch=64)), mtp_weight=0.5)
    assert outcome.gradients.keys() == {name for name in hf_names(pair.shape) if not name.endswith("e_score_correction_bias")}
    loads = [module.local_tokens_per_expert for module in model.modules() if isinstance(module, SigmoidRouter)]
    idle = {
        (layer, expert) for layer, load in enumerate(loads, pair.shape.num_dense_layers)
        for expert, tokens in enumerate(load.tolist()) if tokens == 0
    }
    assert outcome.unused == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer, expert in idle for part in ("gate_proj", "up_proj", "down_proj")
    }
    assert len(idle) <= 1


@torch.no_grad()
def test_every_tensor_moves_the_losses_it_should(pair):
    """Those of the MTP layer its own loss, all others both. A router bias moves the choice, where there is one."""
    model = pair.ours()
    batch = plain_batch(*map(list, next_tokens(pair.token_ids)), torch.device("cpu"))

    def losses() -> tuple[float, float]:
        model.mtp_weight = 1.0
        main = model(
            input_ids=batch.token_ids, position_ids=batch.position_ids, attention_mask=None, labels=batch.labels,
            loss_mask=batch.loss_mask, packed_seq_params=batch.documents,
        )
        return main.sum().item(), model.take_mtp_loss()[0].item()

    main, ahead = losses()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in named_tensors([model]).items():
        kept, is_bias = tensor.clone(), name.endswith("expert_bias")
        tensor.add_(torch.randn(tensor.shape, generator=generator) * (2 if is_bias else 0.1))
        moved_main, moved_ahead = losses()
        tensor.copy_(kept)
        chooses_all = is_bias and pair.shape.experts_per_token == pair.shape.num_experts
        assert (moved_ahead != ahead) is not chooses_all, f"{name} does not reach the MTP loss"
        assert (moved_main != main) is not (chooses_all or name.startswith("mtp.")), f"{name} and the next-token loss"
    assert losses() == (main, ahead), "what was put back is as before"
