"""A quality classifier: logistic regression on hashed words and pairs of words, trained from good and bad examples.

``python -m pretrain.classifier GOOD BAD MODEL`` trains it: GOOD and BAD are folders or files of text, jsonl or parquet. The
model file holds numbers only (npz), no code.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from glm.data.documents import user_documents
from glm.errors import DataError
from pretrain.scorers import Scorer, register_scorer

CHARACTERS = 20_000
"""As many from the start of a document are looked at."""
FEATURES = 2**18


def _features(texts: Sequence[str]):
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=FEATURES, ngram_range=(1, 2), alternate_sign=False).transform([text[:CHARACTERS] for text in texts])


def train_classifier(good: Sequence[str], bad: Sequence[str], path: Path, seed: int = 0) -> float:
    """Writes the model; returns its accuracy on a tenth of the examples that it was not trained on. Raises DataError for too few."""
    from sklearn.linear_model import LogisticRegression

    if min(len(good), len(bad)) < 10:
        raise DataError("classifier", f"{len(good)} good and {len(bad)} bad examples", "at least 10 of each", "give more examples")
    labels = np.array([1] * len(good) + [0] * len(bad))
    order = np.random.default_rng(seed).permutation(len(labels))
    texts = [*good, *bad]
    apart = max(2, len(labels) // 10)
    held_out, trained = order[:apart], order[apart:]
    model = LogisticRegression(C=100.0, class_weight="balanced", max_iter=200, solver="liblinear", random_state=seed)
    model.fit(_features([texts[i] for i in trained]), labels[trained])
    with path.open("wb") as out:
        np.savez_compressed(out, weights=model.coef_[0].astype(np.float32), bias=model.intercept_.astype(np.float32))
    return float((model.predict(_features([texts[i] for i in held_out])) == labels[held_out]).mean())


@register_scorer("classifier")
def _load(model: str) -> Scorer:
    path = Path(model).expanduser()
    try:
        with np.load(path, allow_pickle=False) as stored:
            weights, bias = stored["weights"], stored["bias"]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        todo = "train it: python -m pretrain.classifier GOOD BAD MODEL"
        raise DataError(f"quality.options.model {path}", f"not readable: {error}", "a model of pretrain.classifier", todo) from error

    def score(texts: Sequence[str]) -> np.ndarray:
        return 1 / (1 + np.exp(-(_features(texts) @ weights + bias)))

    return score


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("usage: python -m pretrain.classifier GOOD BAD MODEL", file=sys.stderr)
        return 2
    good, bad = ([text for _, text in user_documents(Path(folder))] for folder in arguments[:2])
    accuracy = train_classifier(good, bad, Path(arguments[2]))
    print(f"{arguments[2]}: {len(good)} good, {len(bad)} bad examples, {accuracy:.1%} right on the tenth held out")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
