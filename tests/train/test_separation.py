"""Nothing of one document reaches another: by gradient, and by the proof every packed stage begins with."""

import json

import pytest
import torch

from glm import platform

platform.activate("host")
from glm.errors import NumericsError  # noqa: E402  (imports below load megatron)
from glm.model.attention import SDPAttention  # noqa: E402
from glm.train.separation import check_documents_apart  # noqa: E402
from tests.layout.cases import Case  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.train.apart import found  # noqa: E402
from tests.train.test_trainer import trainer  # noqa: E402


@pytest.mark.parametrize("case", [Case(1), Case(1, packed=True), Case(2, cp=2, packed=True)], ids=lambda case: case.label)
def test_outputs_of_one_document_have_no_gradient_at_another(case, tmp_path):
    if case.ranks == 1:
        told = found(case)
    else:
        run_ranks("tests.train.apart", case.ranks, str(tmp_path), json.dumps(case.as_json()))
        told = json.loads((tmp_path / "found.json").read_text())
    for name in ("trunk", "MTP layer"):
        across, within = told[name]
        assert across == 0.0 and within > 1e-6, name
    if case.packed:
        assert f"cp {case.cp}" in told["line"] and "decoder.layers.0 and mtp.layers.0" in told["line"]


def leaky(forward):
    """Attention over the whole row, as if the pack were one document."""
    return lambda self, query, key, value, *rest, packed_seq_params=None, **options: forward(self, query, key, value, *rest, **options)


def test_attention_that_forgets_the_documents_is_noticed_by_both(monkeypatch):
    monkeypatch.setattr(SDPAttention, "forward", leaky(SDPAttention.forward))
    with pytest.raises(NumericsError, match="changed what another one got"):
        check_documents_apart(trainer())
    monkeypatch.setattr("glm.train.separation.check_documents_apart", lambda one: "")
    assert found(Case(1, packed=True))["trunk"][0] > 0


def test_a_last_token_that_leaks_is_noticed(monkeypatch):
    """One wrong number among all: the proof compares bits, not sizes."""
    right = SDPAttention.forward

    def forward(self, query, key, value, *rest, **options):
        out = right(self, query, key, value, *rest, **options)
        return torch.cat([out[:-1], out[-1:] + 1e-6 * value[0].repeat_interleave(2, dim=1).flatten(1)], dim=0)

    monkeypatch.setattr(SDPAttention, "forward", forward)
    with pytest.raises(NumericsError, match="1 probes|2 probes"):
        check_documents_apart(trainer())
