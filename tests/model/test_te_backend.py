"""transformer-engine's part of a layer, as far as it can be checked without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from glm import platform

platform.activate("host")
from glm.errors import PlatformError  # noqa: E402  (imports below load megatron)
from glm.model import te_backend  # noqa: E402
from glm.model.attention import SDPAttention  # noqa: E402
from glm.model.config import transformer_config  # noqa: E402
from glm.model.experts import StackedExperts  # noqa: E402
from glm.model.gated import SwiGLU  # noqa: E402
from glm.model.layers import decoder_spec  # noqa: E402
from glm.platform.kernels import transformer_engine  # noqa: E402
from glm.recipe.check import _refuse_kernels, refuse_unproved  # noqa: E402
from glm.recipe.schema import TrainRecipe  # noqa: E402
from glm.train.batch import packed_batch, plain_batch  # noqa: E402
from tests.model_fixture import tiny_shape  # noqa: E402

SHAPE, CPU = tiny_shape(), torch.device("cpu")
ABSENT = transformer_engine() is None


def recipe(**changes) -> TrainRecipe:
    return TrainRecipe(**{
        "name": "test", "stage": "test", "main": "pretrain.train", "run_folder": "unused", "model": SHAPE, "platform": "cuda",
        "sequence_length": 32, "rotary_base": 10_000, "batch": {"tokens": 64}, "tokens": 64,
        "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3}, "kernels": {"attention": "te"},
        "data": {"mixture": "unused", "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
    } | changes)


@pytest.mark.skipif(not ABSENT, reason="transformer-engine is installed")
def test_without_transformer_engine_the_error_says_what_to_install():
    with pytest.raises(PlatformError, match="pip install .*transformer-engine") as told:
        decoder_spec(transformer_config(SHAPE), attention="te")
    assert "kernels.attention=sdpa" in told.value.todo


@pytest.mark.skipif(ABSENT, reason="transformer-engine is not installed: what it is made of cannot be looked at")
def test_the_dense_part_is_upstreams_and_the_experts_are_ours():
    from megatron.core.extensions import transformer_engine as upstream

    dense, moe = decoder_spec(transformer_config(SHAPE), attention="te").layer_specs[:2]
    attention = dense.submodules.self_attention.submodules
    assert attention.linear_qkv is upstream.TEColumnParallelLinear and attention.linear_proj is upstream.TERowParallelLinear
    assert dense.submodules.input_layernorm is upstream.TENorm, "a norm fused into a linear layer would change names"
    assert dense.submodules.mlp.submodules.linear_fc1 is upstream.TEColumnParallelLinear
    assert attention.core_attention is te_backend.DocumentAttention
    assert moe.submodules.mlp.submodules.experts.module is StackedExperts
    assert moe.submodules.mlp.submodules.shared_experts.submodules.activation_func is SwiGLU


@pytest.mark.parametrize(("changes", "words"), [
    ({"platform": "host"}, "GPUs only"),
    ({"kernels": {"attention": "te", "experts": "te"}}, "one parameter an expert"),
    ({"kernels": {"experts": "host"}}, "host with platform: cuda"),
])
def test_kernels_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(PlatformError, match=words):
        refuse_unproved(recipe(**changes))


def test_transformer_engine_on_a_gpu_is_allowed():
    refuse_unproved(recipe())


def test_packed_documents_under_context_parallelism_are_refused_with_te():
    packed = {"mixture": "unused", "packing": "best_fit", "sources": {"prose": {"corpus": "prose", "share": 1.0}}}
    changes = {"layout": {"cp": 2}, "launcher": {"ranks_per_node": 2}, "data": packed}
    with pytest.raises(PlatformError, match="te with packed documents"):
        _refuse_kernels(recipe(**changes))


class ThdAttention(torch.nn.Module):
    """What transformer-engine promises for "thd": each run between two bounds attends to itself, causally."""

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        if packed_seq_params is None:
            rows = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=0.25, enable_gqa=True)
            return out.permute(2, 0, 1, 3).flatten(2)
        assert packed_seq_params.qkv_format == "thd" and query.dim() == 3
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        assert packed_seq_params.max_seqlen_q == max(end - start for start, end in zip(bounds, bounds[1:]))
        parts = []
        for start, end in zip(bounds, bounds[1:]):
            one = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=0.25, enable_gqa=True)
            parts.append(out.transpose(0, 1).flatten(1))
        return torch.cat(parts)


def random_tokens(length: int):
    ids = torch.zeros(length, dtype=torch.int64)
    return [ids], [ids], [torch.ones(length)]


@pytest.mark.parametrize("documents", [
    packed_batch(*(list(part) * 3 for part in random_tokens(7)), [7, 7, 7], CPU).documents,
    plain_batch(*random_tokens(21), CPU).documents,
    None,
])
def test_documents_reach_transformer_engine_as_they_reach_our_attention(documents, monkeypatch):
    monkeypatch.setattr(te_backend, "_attention", lambda config, **arguments: ThdAttention())
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(21, 1, heads, 16, generator=generator) for heads in (4, 2, 2))
    ours = SDPAttention(None, 1, None, "self", softmax_scale=0.25, pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1)))
    expected = ours(query, key, value, packed_seq_params=documents)
    found = te_backend.DocumentAttention(None)(query, key, value, packed_seq_params=documents)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)
