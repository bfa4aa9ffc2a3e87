"""The rules of CONTRIBUTING.md that a program can read off the source: who may import whom, and what may stand where.

Everything is read with ast, nothing is imported, except for the last test, which looks at what an import brings with it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("glm", "pretrain", "midtrain", "posttrain", "tools")

# From the ground up. A file imports its own package and lower rows, never a neighbour in its row.
LAYERS = (
    ("glm.errors",),
    ("glm.recipe",),
    ("glm.checkpoint.run_folder",),
    ("glm.platform",),
    ("glm.runtime", "glm.metrics", "glm.tokenizer"),
    ("glm.model", "glm.optim", "glm.data"),
    ("glm.checkpoint", "glm.weights", "glm.inference"),
    ("glm.train", "glm.convert"),
    ("glm.rl", "glm.plan"),
    ("glm.launch",),
    ("glm.doctor", "glm.show"),
    ("glm.check",),
    ("glm.rank", "glm.cli"),
    ("pretrain", "midtrain", "posttrain", "tools"),
)
LAYER_OF = {package: height for height, row in enumerate(LAYERS) for package in row}

# package: where it may be imported
IMPORTED_ONLY_IN = {
    "wandb": ("glm/metrics/sinks.py",),
    "sglang": ("glm/platform/", "glm/inference/serve.py"),
    "ray": (),
}
NEVER_IMPORTED_IN = {"glm/recipe/": ("torch", "megatron", "transformers"), "glm/data/problems.py": ("torch",)}
DEVICE_WORDS_IN = ("glm/platform/", "glm/recipe/")
ENVIRONMENT_IN = ("glm/platform/", "glm/launch")
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MOST_LINES = 450


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the file ``path`` (relative, with slashes) holding ``source``: one ``path:line: words`` each."""
    found = []
    if Path(path).stem in EMPTY_NAMES:
        found.append(f"{path}:1: a file named {Path(path).name} has no subject")
    if source.count("\n") > MOST_LINES:
        found.append(f"{path}:{MOST_LINES}: longer than {MOST_LINES} lines")
    tree = ast.parse(source, filename=path)
    if path.startswith(SOURCES):
        if path != "glm/__init__.py" and not _package(_dotted(path)):
            found.append(f"{path}:1: belongs to no layer: name its package in LAYERS")
        allowed_words = {id(word) for node in ast.walk(tree) if _is_literal_type(node) for word in ast.walk(node)}
        for node in ast.walk(tree):
            words = [*_import_faults(path, node), *_device_faults(path, node, allowed_words), *_except_faults(node)]
            found += [f"{path}:{node.lineno}: {what}" for what in words]
    return found


def _import_faults(path: str, node: ast.AST):
    own = _package(_dotted(path))
    for name in _imported(path, node):
        other, top = _package(name), name.split(".")[0]
        if other and own and other != own and LAYER_OF[other] >= LAYER_OF[own]:
            yield f"{own} may not import {name}: it is not in a lower layer"
        if top in IMPORTED_ONLY_IN and not path.startswith(IMPORTED_ONLY_IN[top]):
            yield f"{top} may only be imported in {', '.join(IMPORTED_ONLY_IN[top]) or 'no file'}"
        for place, packages in NEVER_IMPORTED_IN.items():
            if path.startswith(place) and top in packages:
                yield f"{place} may not import {top}"
        if name in ("os.environ", "os.getenv") and not path.startswith(ENVIRONMENT_IN):
            yield "the environment is read in glm/platform and glm/launch only"


def _imported(path: str, node: ast.AST) -> list[str]:
    """Dotted names an import statement names; ``from a import b`` gives a.b, which may be a module or a thing in a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = node.module or ""
        if node.level:
            above = path.split("/")[: -node.level]
            start = ".".join([*above, *([start] if start else [])])
        return [f"{start}.{alias.name}" for alias in node.names]
    return []


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _package(name: str) -> str | None:
    """The longest entry of LAYERS that ``name`` lies in."""
    parts = name.split(".")
    return next((".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in LAYER_OF), None)


def _device_faults(path: str, node: ast.AST, allowed_words: set[int]):
    if not path.startswith(DEVICE_WORDS_IN):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and getattr(node.value, "id", "") == "torch":
            yield "torch.cuda belongs in glm/platform"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed_words:
            if node.value in ("cuda", "nccl") or node.value.startswith("cuda:"):
                yield f"the word {node.value!r} belongs in glm/platform"
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
        if node.attr in ("environ", "getenv", "putenv") and not path.startswith(ENVIRONMENT_IN):
            yield "the environment is read in glm/platform and glm/launch only"


def _is_literal_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"


def _except_faults(node: ast.AST):
    if not isinstance(node, ast.ExceptHandler):
        return
    if node.type is None:
        yield "bare except"
    elif isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"):
        if not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            yield f"except {node.type.id} that does not raise again"


def test_the_source_keeps_its_layers():
    files = [path for folder in (*SOURCES, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10, "the sources were not found"
    found = [fault for path in files for fault in violations(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(("path", "source", "words"), [
    ("glm/recipe/compose.py", "from glm.model import build", "not in a lower layer"),
    ("glm/recipe/compose.py", "def f():\n    import torch", "may not import torch"),
    ("glm/model/build.py", "from glm.optim.muon import Muon", "not in a lower layer"),
    ("glm/model/build.py", "from ..train import loop", "not in a lower layer"),
    ("glm/metrics/log.py", "from glm.checkpoint import store", "not in a lower layer"),
    ("glm/rl/loop.py", "import posttrain.rewards", "not in a lower layer"),
    ("pretrain/train.py", "from posttrain import sft", "not in a lower layer"),
    ("glm/metrics/log.py", "import wandb", "wandb may only"),
    ("glm/rl/rollout.py", "from ray import remote", "ray may only"),
    ("glm/inference/client.py", "import sglang.srt", "sglang may only"),
    ("glm/train/step.py", "torch.cuda.synchronize()", "torch.cuda belongs"),
    ("glm/train/step.py", "x.to('cuda:0')", "belongs in glm/platform"),
    ("glm/train/step.py", "start(backend='nccl')", "belongs in glm/platform"),
    ("glm/train/step.py", "rank = os.environ['RANK']", "environment"),
    ("glm/train/step.py", "from os import environ", "environment"),
    ("glm/train/step.py", "try:\n    f()\nexcept:\n    raise", "bare except"),
    ("glm/train/step.py", "try:\n    f()\nexcept Exception:\n    pass", "does not raise again"),
    ("glm/newcomer.py", "", "belongs to no layer"),
    ("glm/data/utils.py", "", "has no subject"),
    ("tests/data/test_x.py", "\n" * 451, "longer than"),
])
def test_the_checker_catches_a_planted_violation(path, source, words):
    found = violations(path, source)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(("path", "source"), [
    ("glm/metrics/log.py", "from glm.checkpoint.run_folder import RunFolder\nfrom glm.recipe import units\nfrom . import read"),
    ("glm/recipe/schema.py", "from glm.recipe.sections import Model\nplatform: Literal['host', 'cuda']"),
    ("glm/inference/server.py", "platform: Literal['host', 'cuda']"),
    ("glm/platform/cuda.py", "import os\ntorch.cuda.set_device(os.environ['LOCAL_RANK'])"),
    ("glm/train/step.py", "try:\n    f()\nexcept Exception:\n    stop()\n    raise"),
    ("posttrain/rl.py", "from glm.rl import controller\nfrom posttrain.rewards import exact"),
])
def test_the_checker_lets_good_code_pass(path, source):
    assert violations(path, source) == []


def test_what_answers_quickly_does_not_import_torch():
    light = ["glm.errors", "glm.recipe.schema", "glm.recipe.compose", "glm.cli", "glm.data.problems", "glm.metrics.read",
             "glm.metrics.log"]
    there = [name for name in light if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
    heavy = "{'torch', 'megatron', 'transformers', 'sglang', 'matplotlib', 'wandb'}"
    program = f"import sys\nfor name in {there}: __import__(name)\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
