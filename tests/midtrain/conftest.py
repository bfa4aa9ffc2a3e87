import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

from glm.data.conversations import problem_texts
from glm.tokenizer import load_tokenizer, train_tokenizer
from glm.tokenizer.encode import text_encoder

settings.register_profile("busy_machine", deadline=None)
settings.load_profile("busy_machine")


class Repository:
    """A real git repository; every commit is made at the same second by the same hand."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *words: str, author: str = "Somebody") -> str:
        identity = ("-c", f"user.name={author}", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main")
        done = subprocess.run(["git", *identity, *words], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def write(self, **files: str | bytes) -> None:
        for name, content in files.items():
            self.write_at(name, content)

    def write_at(self, path: str, content: str | bytes) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, message: str, files: dict[str, str | bytes | None] | None = None, *, author: str = "Somebody") -> str:
        """Writes ``files`` (None removes one), commits everything, returns the commit."""
        for path, content in (files or {}).items():
            if content is None:
                (self.folder / path).unlink()
            else:
                self.write_at(path, content)
        self.git("add", "-A", author=author)
        self.git("commit", "-q", "--allow-empty", "-m", message, author=author)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path) -> Repository:
    return Repository(tmp_path / "calculator")


@pytest.fixture
def story(repository) -> Repository:
    """A small project with a merged pull request, a squashed one, a bot, and files nobody wants to read."""
    repository.commit("Begin\n\nSigned-off-by: Somebody <a@b.c>", {
        "README.md": "# calculator\nIt adds.\n", "src/calculator/__init__.py": "from calculator.main import run\n",
        "src/calculator/main.py": "from calculator.add import add\n\n\ndef run():\n    return add(1, 2)\n",
        "src/calculator/add.py": "def add(a, b):\n    return a - b\n", "vendor/left.js": "x", "poetry.lock": "y", "logo.png": b"\x89PNG\0\0",
        "token.txt": "write <|user|> and <|endoftext|> here\n",
    })
    repository.git("checkout", "-q", "-b", "fix")
    repository.commit("Add instead of subtract", {"src/calculator/add.py": "def add(a, b):\n    return a + b\n", "poetry.lock": "z"})
    repository.git("checkout", "-q", "main")
    repository.git("merge", "-q", "--no-ff", "-m", "Merge pull request #2 from somebody/fix", "fix")
    repository.commit("Multiply (#4)", {"src/calculator/multiply.py": "def multiply(a, b):\n    return a * b\n"})
    repository.commit("Bump everything", {"src/calculator/version.py": "VERSION = 2\n"}, author="dependabot[bot]")
    repository.commit("Say what it does\n\nIn more words.", {"README.md": "# calculator\nIt adds and multiplies.\n"})
    repository.commit("Only the lock", {"poetry.lock": "w"})
    return repository


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    source = Path(__file__).parents[2] / "glm"
    texts = [path.read_text() for path in sorted(source.rglob("*.py"))[:40]]
    train_tokenizer([*texts, *problem_texts(500, 0)], 800, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def encode(tokenizer_folder):
    return text_encoder(tokenizer_folder).encode
