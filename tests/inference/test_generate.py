"""Against transformers on the same weights: what the server writes and how likely it says that was."""

import asyncio

import pytest
import torch
from transformers import Glm4MoeForCausalLM

from glm.errors import EngineError
from glm.inference.client import Sampling
from glm.inference.engine_layout import compare
from glm.inference.speculative import acceptance_length

PROMPTS = [[5, 6, 7, 8], [17, 200, 31, 4, 99, 120, 3], [250, 1]]


@pytest.fixture(scope="module")
def reference(model_folder):
    return Glm4MoeForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs_under(reference, prompt, reply, temperature=1.0):
    """Log-probability of every token of the reply, by one forward of transformers."""
    ids = torch.tensor([[*prompt, *reply.token_ids]])
    with torch.no_grad():
        logits = reference(ids).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def test_greedy_with_drafts_is_the_argmax_of_transformers_at_every_token(ask, loaded, reference):
    replies = ask(lambda client: client.generate_batch(PROMPTS, Sampling(0.0, 24)))
    for prompt, reply in zip(PROMPTS, replies):
        ids = torch.tensor([[*prompt, *reply.token_ids]])
        with torch.no_grad():
            best = reference(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert reply.token_ids == best
        assert reply.verify_rounds >= 24 / 4 - 1  # it was decoded with drafts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(ask, loaded, reference, temperature):
    replies = ask(lambda client: client.generate_batch(PROMPTS * 4, Sampling(temperature, 20)))
    for prompt, reply in zip(PROMPTS * 4, replies):
        expected = logprobs_under(reference, prompt, reply, temperature)
        assert (torch.tensor(reply.logprobs) - expected).abs().max() < 1e-4
    wrong = logprobs_under(reference, PROMPTS[0], replies[0], temperature * 1.1)  # the twin: another temperature
    assert (torch.tensor(replies[0].logprobs) - wrong).abs().max() > 1e-2


def test_some_drafts_are_accepted_and_lengths_add_up(ask, loaded):
    replies = ask(lambda client: client.generate_batch(PROMPTS * 10, Sampling(1.0, 24)))
    assert all(len(reply.token_ids) == len(reply.logprobs) <= 24 for reply in replies)
    assert 1.0 < acceptance_length(replies) <= 4.0


def test_a_stop_token_ends_the_reply_and_is_part_of_it(ask, loaded):
    plain = ask(lambda client: client.generate(PROMPTS[0], Sampling(0.0, 24)))
    stop = plain.token_ids[6]
    reply = ask(lambda client: client.generate(PROMPTS[0], Sampling(0.0, 24, (stop,))))
    assert reply.finish_reason == "stop" and reply.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
    assert len(reply.logprobs) == len(reply.token_ids)


def test_many_single_requests_at_once_give_what_one_batch_gives(ask, loaded):
    async def both(client):
        batch = await client.generate_batch(PROMPTS * 8, Sampling(0.0, 8))
        single = await asyncio.gather(*(client.generate(prompt, Sampling(0.0, 8)) for prompt in PROMPTS * 8))
        return batch, single

    batch, single = ask(both)
    assert [reply.token_ids for reply in batch] == [reply.token_ids for reply in single]


def test_a_request_that_does_not_fit_is_an_error_with_the_servers_words(ask, loaded):
    with pytest.raises(EngineError, match="(?i)context|longer|exceed"):
        ask(lambda client: client.generate([1] * 400, Sampling(1.0, 4)))


def test_a_server_that_is_not_there_is_an_error_after_counted_retries(ask):
    async def to_nobody(client):
        client.url = "http://127.0.0.1:9"
        with pytest.raises(EngineError, match="no whole answer in 2 attempts"):
            await client.generate([1], Sampling(1.0, 1))
        return client.retried

    assert ask(to_nobody, connection_retries=1) == 1


def test_without_the_key_the_server_refuses(ask):
    with pytest.raises(EngineError, match="401"):
        ask(lambda client: client.generate([1], Sampling(1.0, 1)), api_key="wrong")


def test_compare_accepts_equal_sides_only():
    side = {"target": {"a": "1"}, "draft": {"b": "2"}}
    compare(side, {"target": {"a": "1"}, "draft": {"b": "2"}})
    with pytest.raises(EngineError, match="missing 1: draft.b; unexpected 1: draft.c"):
        compare(side, {"target": {"a": "1"}, "draft": {"c": "2"}})
