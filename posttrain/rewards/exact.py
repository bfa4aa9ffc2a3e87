"""Reward 1 for the exact answer, else 0. Only the outcome counts, not how it was thought out."""

from glm.data.problems import Problem
from glm.tokenizer.special_tokens import CONTROL_TOKENS, END_THINK, STOP_TOKENS, THINK


def visible_answer(reply_text: str) -> str:
    """What stands after the last </think>, without the token that ended the turn. A thought never closed leaves nothing."""
    thought, closed, answer = reply_text.rpartition(END_THINK)
    if not closed and THINK in reply_text:
        return ""
    for token in STOP_TOKENS:
        answer = answer.removesuffix(token)
    return answer.strip()


def reward(reply_text: str, problem: Problem) -> float:
    """``reply_text``: the reply decoded with its control tokens. A control token inside the answer makes it wrong."""
    answer = visible_answer(reply_text)
    return float(answer == problem.answer and not any(token in answer for token in CONTROL_TOKENS))
