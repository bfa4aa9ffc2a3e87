"""Optional GPU kernels: told apart when installed, and told clearly when not."""

import pytest

from glm import doctor
from glm.errors import PlatformError
from glm.platform import kernels


@pytest.fixture
def python_path(tmp_path, monkeypatch):
    """A folder from which Python imports."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def make_package(folder, name: str, *parts: str) -> None:
    for part in ("", *parts):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
        (folder / name / part / "__init__.py").write_text("raise SystemExit('looking must not import')")


def test_no_apex_is_fine():
    assert kernels.apex() == kernels.Apex("absent")
    assert doctor.judge_apex(kernels.apex()).state == "fine"


def test_pypis_apex_is_refused_by_name(python_path):
    make_package(python_path, "apex", "lib")
    assert kernels.apex().state == "unrelated"
    assert doctor.judge_apex(kernels.apex()).state == "wrong"
    with pytest.raises(PlatformError, match="pip uninstall apex"):
        kernels.refuse_unrelated_apex()


def test_nvidias_apex_adds_gradients_only_with_its_extension(python_path):
    make_package(python_path, "apex", "normalization", "multi_tensor_apply")
    assert kernels.apex() == kernels.Apex("nvidia", adds_gradients=False)
    assert doctor.judge_apex(kernels.apex()).state == "note"
    kernels.refuse_unrelated_apex()
    (python_path / f"{kernels.GRADIENT_EXTENSION}.py").write_text("")
    assert kernels.apex() == kernels.Apex("nvidia", adds_gradients=True)


@pytest.mark.parametrize(("version", "state"), [(None, "fine"), ("2.9.0", "fine"), ("2.11.1", "fine"), ("2.12.0", "note"), ("1.13.0", "note")])
def test_the_doctor_knows_which_transformer_engine_megatron_names(version, state):
    assert doctor.judge_transformer_engine(version).state == state
