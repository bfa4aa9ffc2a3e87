"""The sections of the stage that turns repositories, reasoning, long texts and agents' work into corpora (docs/midtraining.md).

Numbers are our choices unless said otherwise. Paths may hold ``*``; a .list file gives one path a line; records may be .jsonl.gz or .jsonl.zst.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glm.recipe.sections import Section
from glm.recipe.units import Count, PositiveCount

Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class RepositoryCorpus(Section):
    """Repositories: their files, and where asked for their issues, pull requests and commits."""

    paths: Paths
    """Git checkouts, bare git repositories or plain folders. ``python``: the packages of the running Python installation;
    ``python:json``: one of them."""
    discussions: str | None = None
    """A folder with NAME.jsonl for a repository NAME: its issues and pull requests, as GitHub's API or ``gh`` gives them."""
    commits: Annotated[Count, Field(ge=0)] = 0
    """Newest commits of a repository that become documents of their own."""
    document_tokens: PositiveCount = 32_768
    """Longest document: the sequence length of the stage that reads it (P 2.3)."""
    largest_file_bytes: PositiveCount = 1_000_000
    repositories_per_task: PositiveCount = 32

    @property
    def needs_history(self) -> bool:
        return self.commits > 0 or self.discussions is not None


class ReasoningCorpus(Section):
    """Questions with reasoning and answers: one record a line of .jsonl or a row of .parquet."""

    paths: Paths
    """``problems``: ``data.problems`` procedurally generated ones."""
    form: Literal["chat", "text"] = "chat"
    """chat: through the chat template, with thinking. text: Question, Reasoning, Answer."""
    fields: dict[Literal["question", "reasoning", "answer"], str] = {}
    """Names of these three in the records, where they are others. A record with ``messages`` is taken as it is."""
    document_tokens: PositiveCount = 32_768
    """A longer record is dropped: half a proof teaches none."""
    task_bytes: PositiveCount = 64_000_000


class LongCorpus(Section):
    """Long documents of raw text, sorted by their number of tokens; a mixture reads each bucket as often as it likes."""

    paths: Paths
    """Folders or files of text, .jsonl or .parquet."""
    buckets: Annotated[dict[str, PositiveCount], Field(min_length=1)] = {"long": 32_768, "longest": 98_304}
    """Bucket -> fewest tokens of a document; shorter ones than all are dropped."""
    text_field: str = "text"
    task_bytes: PositiveCount = 64_000_000

    @model_validator(mode="after")
    def _apart(self):
        if "all" in self.buckets or len(set(self.buckets.values())) < len(self.buckets):
            raise ValueError("buckets with different numbers of tokens, none of them called all")
        return self


class AgentCorpus(Section):
    """Agents' trajectories: OpenAI-style ``messages`` with tool calls and their results, and ``tools``, one a line or row."""

    paths: Paths
    document_tokens: PositiveCount = 131_072
    """A longer trajectory is dropped."""
    task_bytes: PositiveCount = 64_000_000
