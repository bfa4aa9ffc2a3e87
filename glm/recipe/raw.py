"""The sections of a stage that turns raw text into tokenized corpora (docs/data.md). Numbers are our choices unless said otherwise."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glm.recipe.sections import Fraction, Positive, Section
from glm.recipe.units import PositiveCount


class RawData(Section):
    documents: str | None = None
    """The user's own text, a folder or file, in place of every source that names a corpus of the Python installation."""
    problems: PositiveCount = 20_000
    """How many procedurally generated problems to draw, for a source with ``corpus: problems``."""


class Language(Section):
    """Which languages stay. Told from the first 2,000 characters of a document (py3langid)."""

    keep: Annotated[tuple[str, ...], Field(min_length=1)]
    """ISO 639-1 codes."""
    among: tuple[str, ...] = ()
    """Languages the identifier chooses from; none: all 97 it knows. Fewer are surer on short documents."""
    least_probability: Fraction = 0.0
    """A document whose language is less sure is dropped."""


class Quality(Section):
    """Scores every document and sorts the documents into buckets; what is below every bucket is dropped."""

    scorer: str = "heuristics"
    """A registered scorer: heuristics, code, classifier, or one of the recipe's ``plugins``."""
    options: dict[str, object] = {}
    """What the scorer is made with (classifier: ``model``, its file)."""
    by: Literal["quantile", "score"] = "quantile"
    """quantile: an edge is the share of the source's bytes that scores lower. score: an edge is a score."""
    buckets: dict[str, Fraction] = {"high": 0.9, "medium": 0.3, "low": 0.1}
    """Bucket -> lower edge."""

    @model_validator(mode="after")
    def _apart(self):
        if not self.buckets:
            raise ValueError("at least one bucket")
        if len(set(self.buckets.values())) < len(self.buckets):
            raise ValueError("buckets with different lower edges")
        for name in self.buckets:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"bucket names of letters, digits and underscores, not {name!r}")
        return self


class FillInTheMiddle(Section):
    """Documents whose middle is told last, between GLM's <|code_prefix|>, <|code_suffix|> and <|code_middle|>. All source code (P 2.3)."""

    rate: Fraction = 0.5
    """Share of the documents. Open in P."""
    suffix_first: Fraction = 0.5
    """Share of those that give the suffix before the prefix (SPM); the others prefix, suffix, middle (PSM). Open in P."""


class RawSource(Section):
    """One named source of raw documents."""

    corpus: Literal["prose", "code", "repositories", "problems"] | None = None
    """A corpus every machine has; read when neither ``path`` nor ``load_dataset`` is given."""
    path: str | None = None
    """A file or folder of text, .jsonl and .parquet (also .jsonl.gz, .jsonl.zst), or a Hugging Face dataset saved to disk."""
    load_dataset: dict[str, object] = {}
    """Arguments of ``datasets.load_dataset``; read as a stream."""
    text_field: str = "text"
    """Key of a record, or column, that holds the text."""
    language: Language | None = None
    quality: Quality | None = None
    """None: one bucket, ``all``."""
    fim: FillInTheMiddle | None = None

    @model_validator(mode="after")
    def _names_its_text(self):
        if self.corpus is None and self.path is None and not self.load_dataset:
            raise ValueError("one of corpus, path and load_dataset")
        if self.path is not None and self.load_dataset:
            raise ValueError("path or load_dataset, not both")
        return self

    @property
    def buckets(self) -> tuple[str, ...]:
        return tuple(self.quality.buckets) if self.quality else ("all",)


class Deduplicate(Section):
    """Equal and nearly equal documents, within and across the sources of a stage; of two alike the first stays, first source first."""

    exact: bool = True
    """Equal after Unicode normalisation, lower-casing and removal of white space and punctuation."""
    near: bool = True
    """MinHash over word shingles; pairs that the bands propose count if their signatures agree in ``threshold``."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Jaccard similarity of the sets of shingles."""
    shingle_words: Positive = 5
    permutations: Annotated[int, Field(ge=16)] = 128


class Semantic(Section):
    """SemDedup (P 2.3): documents whose embeddings nearly point the same way, compared within k-means clusters; the best scored stays."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Cosine similarity."""
    sources: tuple[str, ...] = ()
    """Sources it applies to; none: all."""
    embedder: str = "tfidf_svd"
    """A registered embedder: tfidf_svd, or one of the recipe's ``plugins``."""
    dimensions: Positive = 64
    documents_per_cluster: Positive = 1000
    """There are at most ``sample_documents`` / 4 clusters: with more than 250 times the sample a cluster has more documents."""
    sample_documents: Positive = 20_000
    """Documents that the embedder and the clusters are fitted on, in memory."""
