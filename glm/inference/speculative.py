"""Speculative decoding with the model's own MTP layer, from one recipe number; and how well it works."""

from typing import Iterable

from glm.errors import RecipeError


def speculative_arguments(num_draft_steps: int, model_folder: str) -> dict[str, object]:
    """ServerArgs fields for ``num_draft_steps`` draft tokens a round; none for 0, which decodes plainly.

    The draft is the MTP layer in the same folder, applied again to its own output after the first step. Drafts are
    chains (one candidate a position) and are kept by rejection sampling, so what is sampled follows the target's
    distribution exactly. SGLang's default keeps a draft when a threshold says so, and its acceptance is 8 times lower.
    """
    if num_draft_steps < 0:
        raise RecipeError("recipe key engine.speculative.num_steps", str(num_draft_steps), "0 or more", "0 decodes plainly")
    if num_draft_steps == 0:
        return {}
    return {
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": model_folder,
        "speculative_num_steps": num_draft_steps,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": num_draft_steps + 1,
        "speculative_use_rejection_sampling": True,
    }


def acceptance_length(replies: Iterable) -> float | None:
    """Tokens committed per verification of the target model over all replies: 1 is no gain, num_draft_steps + 1 the most.

    None when no reply was decoded speculatively. The first token of a reply comes from the prompt's own pass and is not
    counted.
    """
    counted = [(len(reply.token_ids) - 1, reply.verify_rounds) for reply in replies if reply.verify_rounds]
    rounds = sum(rounds for _, rounds in counted)
    return sum(tokens for tokens, _ in counted) / rounds if rounds else None
