"""Every field of megatron's TransformerConfig is set or kept on purpose, and docs/model.md says why."""

import dataclasses
from pathlib import Path

import pytest

from glm import platform

platform.activate("host")
import megatron.core.transformer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from glm.model.config import RECOMPUTE, transformer_config  # noqa: E402
from glm.model.config_reasons import KEPT, SET, markdown  # noqa: E402
from glm.recipe.sections import Layout  # noqa: E402
from tests.model_fixture import tiny_shape  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "model.md"


@pytest.fixture
def fields_set(monkeypatch) -> set[str]:
    """Names that glm.model.config hands to megatron, over all kinds of recompute."""
    seen = set()

    class Recording(TransformerConfig):
        def __init__(self, **values):
            seen.update(values)
            super().__init__(**values)

    monkeypatch.setattr(megatron.core.transformer, "TransformerConfig", Recording)
    for kind in RECOMPUTE:
        transformer_config(tiny_shape(), layout=Layout(), recompute=kind)
    return seen


def test_every_field_is_set_or_kept_for_a_reason_and_never_both(fields_set):
    listed_set = [field for row in SET for field in row.fields]
    listed_kept = [field for row in KEPT for field in row.fields]
    every = [*listed_set, *listed_kept]
    assert len(every) == len(set(every)), "listed twice"
    assert set(listed_set) == fields_set, "SET and glm/model/config.py differ"
    assert set(every) == {field.name for field in dataclasses.fields(TransformerConfig)}, "the installed megatron has other fields"
    assert all(row.reason and row.source for row in (*SET, *KEPT))


def test_the_fields_kept_have_upstream_s_default():
    config, plain = transformer_config(tiny_shape()), TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    derived = {    # from fields that we set, by upstream's __post_init__
        "init_method", "output_layer_init_method", "embedding_init_method", "embedding_init_method_std",
    }
    for field in (field for row in KEPT for field in row.fields if field not in derived):
        assert getattr(config, field) == getattr(plain, field), field


def test_the_document_prints_the_tables_as_they_are():
    assert markdown() in DOCUMENT.read_text(encoding="utf-8")
