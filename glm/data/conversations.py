"""The problems as text: plain question-and-answer documents, and chats with and without thinking."""

from glm.data.problems import TASKS, Problem, training_problems

NOTHINK_EVERY = 8
"""One chat in this many is answered without thinking, so that ``/nothink`` has a meaning."""


def plain_text(problem: Problem) -> str:
    return f"Question: {problem.question}\nReasoning: {problem.reasoning}\nAnswer: {problem.answer}"


def messages_of(problem: Problem, *, thinking: bool = True) -> list[dict[str, str]]:
    """A user's question and the assistant's reply, in the form ``glm.tokenizer.chat_template`` renders."""
    reply = {"role": "assistant", "content": problem.answer}
    if thinking:
        reply["reasoning_content"] = problem.reasoning
    return [{"role": "user", "content": problem.question}, reply]


def problem_documents(count: int, seed: int) -> list[tuple[str, str]]:
    """(key, text) of each."""
    return [(problem.key, plain_text(problem)) for problem in training_problems(TASKS, count, seed)]


def problem_texts(count: int, seed: int) -> list[str]:
    return [text for _, text in problem_documents(count, seed)]


def problem_dialogues(count: int, seed: int) -> list[tuple[str, list[dict[str, str]], bool]]:
    """``count`` chats, each as (key of its problem, messages, whether its assistant thinks).

    The blocks of ``len(TASKS)`` chats share one choice, so every task is seen both ways. Drawn apart from
    ``problem_texts`` of the same seed; some problems come in both.
    """
    problems = training_problems(TASKS, count, seed + 1)
    thinks = [(index // len(TASKS)) % NOTHINK_EVERY != NOTHINK_EVERY - 1 for index in range(count)]
    return [(problem.key, messages_of(problem, thinking=think), think) for problem, think in zip(problems, thinks)]
