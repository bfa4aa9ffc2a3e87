"""The language of a document, as py3langid tells it: naive Bayes over byte n-grams, 97 languages, no model to fetch."""

from functools import lru_cache

from glm.errors import RecipeError
from glm.recipe.raw import Language

CHARACTERS = 2000
"""As many from the start of a document are looked at."""


@lru_cache(maxsize=4)
def _identifier(among: tuple[str, ...]):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among:
        unknown = set(among) - set(identifier.nb_classes)
        if unknown:
            known = " ".join(sorted(identifier.nb_classes))
            raise RecipeError("language", f"no language {', '.join(sorted(unknown))}", f"codes out of {known}", "correct the codes")
        identifier.set_languages(list(among))
    return identifier


def check_languages(language: Language) -> None:
    """Raises RecipeError for a code the identifier does not know, or that it could never answer."""
    _identifier(tuple(sorted({*language.among, *language.keep})))
    if language.among and set(language.keep) - set(language.among):
        missing = ", ".join(sorted(set(language.keep) - set(language.among)))
        raise RecipeError("language.keep", f"{missing}, which `among` leaves out", "languages out of `among`", "add them to `among`")


def identify(text: str, among: tuple[str, ...] = ()) -> tuple[str, float]:
    """(code, probability among ``among``; () is all)."""
    code, probability = _identifier(among).classify(text[:CHARACTERS])
    return str(code), float(probability)
