"""Our MTP layer against the draft that SGLang serves: the released engine decodes speculatively, and every hidden state and
logit of its draft is one that our MTP layer computes on the same text.

The engine runs as it serves, with SGLang's own model classes, cache and verification; its draft class only writes down what
passes through it (tests/parity/sglang_models). Of a draft chain the first step is compared, at every position of prompt and
reply: it is what the MTP layer is trained for. Later steps feed the layer its own output, which training never does.
"""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm.inference.client import EngineClient, Sampling
from glm.inference.server import EngineServer, ServerSpec
from glm.platform.host_sglang import environment
from tests.model_fixture import tiny_shape
from tests.parity.compare import Pair, difference, next_tokens, our_outcome, require
from tests.parity.shapes import VARIANTS
from tests.tiny_model import save_tokenizer

PROMPTS = {"greedy": ([5, 6, 7, 8, 9, 10, 11], Sampling(0.0, 24)), "sampled": ([17, 200, 31, 4, 99], Sampling(1.0, 40))}


class Drafting:
    """A server whose draft is written down."""

    def __init__(self, server: EngineServer, records: Path, pair: Pair):
        self.server, self.records, self.pair = server, records, pair
        self.version = 0

    def load(self, folder: Path) -> None:
        self.version += 1
        self._ask(lambda client: client.update_weights(folder, str(self.version)))

    def text_and_draft(self, kind: str) -> tuple[list[int], Tensor, Tensor, int]:
        """(tokens of prompt and reply, hidden [S - 1, H], logits [some, V] of the last positions, rounds of verification)."""
        for old in self.records.iterdir():
            old.unlink()
        prompt, sampling = PROMPTS[kind]
        reply = self._ask(lambda client: client.generate(prompt, sampling))
        text = [*prompt, *reply.token_ids]
        states: dict[int, tuple[Tensor, Tensor | None]] = {}
        for file in sorted(self.records.glob("*.pt")):
            record = torch.load(file)
            if record["mode"] == "DECODE":  # later steps of a chain
                continue
            rows = len(record["token_ids"])
            logits = [None] * (rows - len(record["logits"])) + list(record["logits"])  # of a prompt, only of its last token
            tokens, positions = record["token_ids"].tolist(), record["positions"].tolist()
            for token, position, hidden, row in zip(tokens, positions, record["hidden"], logits):
                if position + 1 < len(text) and token == text[position + 1]:  # else a draft that was refused
                    states[position] = hidden, row
        assert sorted(states) == list(range(len(text) - 1)), "the draft has seen every token of the text but the first"
        ordered = [states[position] for position in range(len(text) - 1)]
        return text, torch.stack([hidden for hidden, _ in ordered]), \
            torch.stack([row for _, row in ordered if row is not None]), reply.verify_rounds

    def _ask(self, use):
        async def go():
            async with EngineClient(self.server.url, self.server.spec.api_key) as client:
                return await use(client)

        return asyncio.run(go())


@pytest.fixture(scope="module", params=["355b", pytest.param("air", marks=pytest.mark.full)])
def drafting(request, tmp_path_factory):
    pair = Pair.write(request.param, tiny_shape(**VARIANTS[request.param]), tmp_path_factory.mktemp("model"))
    save_tokenizer(pair.folder)
    records = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(environment.HOST, "SGLANG_EXTERNAL_MODEL_PACKAGE", "tests.parity.sglang_models")
        patch.setitem(environment.HOST, "GLM_TEST_DRAFT_RECORDS", str(records))
        spec = ServerSpec(pair.folder, "host", num_draft_steps=3, context_length=256, max_running_requests=8)
        with EngineServer(spec, tmp_path_factory.mktemp("log") / "server.log") as server:
            server.wait_ready(120)
            yield Drafting(server, records, pair)


def ours(pair: Pair, text: list[int], **changed: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states [S - 1, H], logits [S - 1, V]) of the MTP layer at every token that has a next one."""
    model, seen = pair.ours(**changed), []
    model.mtp.register_forward_hook(lambda module, inputs, output: seen.append(output.chunk(2)[1]))
    our_outcome(model, pair.shape, next_tokens(torch.tensor([text])), mtp_weight=1.0)
    hidden = seen[0][:-1, 0].detach()
    return hidden, hidden @ model.output_layer.weight.detach().T


@pytest.mark.parametrize("kind", PROMPTS)
def test_sglangs_draft_computes_what_our_mtp_layer_computes(drafting, kind):
    pair = drafting.pair
    drafting.load(pair.folder)
    text, hidden, logits, rounds = drafting.text_and_draft(kind)
    assert 0 < rounds < len(text), "it decoded with drafts"
    our_hidden, our_logits = ours(pair, text)
    require(logits={
        f"{pair.name}, SGLang's draft, {kind}": difference(our_logits[-len(logits):], logits),
        f"{pair.name}, hidden states of SGLang's draft, {kind}": difference(our_hidden, hidden),
    })


def changes(pair: Pair) -> dict[str, dict[str, Tensor]]:
    """{what: changed tensors} of the MTP layer."""
    prefix = f"model.layers.{pair.shape.num_layers}"
    halves = pair.weights[f"{prefix}.eh_proj.weight"].chunk(2, dim=1)
    return {
        "the halves of eh_proj swapped": {f"{prefix}.eh_proj.weight": torch.cat(halves[::-1], dim=1)},
        "one element of enorm": pair.changed(f"{prefix}.enorm.weight", 1e-2, 0),
        "one element of hnorm": pair.changed(f"{prefix}.hnorm.weight", 1e-2, 0),
        "one element of the last norm": pair.changed(f"{prefix}.shared_head.norm.weight", 1e-2, 0),
        "one element of its attention": pair.changed(f"{prefix}.self_attn.v_proj.weight", 1e-2, 0, 0),
        "one router bias": pair.changed(f"{prefix}.mlp.gate.e_score_correction_bias", 1.0, 3),
    }


def test_a_changed_mtp_weight_is_told_on_either_side(drafting, tmp_path):
    """Loaded into the engine, it moves the engine's draft as it moves ours, away from the unchanged layer's."""
    pair = drafting.pair
    for number, (what, changed) in enumerate(changes(pair).items()):
        twin = Pair.write(what, pair.shape, tmp_path / str(number), **changed)
        save_tokenizer(twin.folder)
        drafting.load(twin.folder)
        text, hidden, _, _ = drafting.text_and_draft("greedy")
        require(logits={f"{pair.name}, SGLang's draft, {what}": difference(ours(pair, text, **changed)[0], hidden)})
        with pytest.raises(AssertionError, match="logits differs by"):
            require(logits={what: difference(ours(pair, text)[0], hidden)})
