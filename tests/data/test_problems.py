import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.data.conversations import problem_dialogues, problem_texts
from glm.data.problems import TASKS, Problem, held_out_problems, problem, training_problem, training_problems


def letters_in(question: str) -> list[str]:
    """The operands are the single small letters; only the asked letter of a counting task stands before them."""
    words = question.translate(str.maketrans("?.:", "   ")).split()
    return [word for word in words if len(word) == 1 and word.islower()]


def digits_in(question: str) -> str:
    return "".join(filter(str.isdigit, question))


def solve(task: str, question: str) -> str:
    """Answers by reading the question alone, in other ways than the generator."""
    letters, digits = letters_in(question), digits_in(question)
    if task == "reverse":
        return " ".join(reversed(letters))
    if task == "sort":
        return "".join(digit for digit in "0123456789" for _ in range(digits.count(digit)))
    if task == "upper":
        return " ".join(letters).upper()
    if task == "count":
        return str(Counter(letters[1:])[letters[0]])
    if task == "largest":
        return next(digit for digit in "9876543210" if digit in digits)
    if task == "add":
        return str(sum(map(int, digits)))
    if task == "ends":
        return f"{letters[0]} {letters[-1]}"
    if task == "following":
        return " ".join("abcdefghijklm"["abcdefghijklm".index(letter) + 1] for letter in letters)
    raise AssertionError(task)


def reasoning_is_sound(drawn: Problem) -> bool:
    """Every step says something true, and the last leads to the answer."""
    steps, answer, letters = drawn.reasoning, drawn.answer, letters_in(drawn.question)
    if drawn.task == "reverse":
        return steps.removeprefix("from the end: ").split(", ") == answer.split()
    if drawn.task == "sort":
        return steps.split("<") == sorted(steps.split("<")) and steps.replace("<", "") == answer
    if drawn.task in ("upper", "following"):
        return [step.split() for step in steps.split(", ")] == [list(pair) for pair in zip(letters, answer.split())]
    if drawn.task == "count":
        counts = [int(step[1]) for step in steps.split()]
        rises = [after - before for before, after in zip([0, *counts], counts)]
        return rises == [int(letter == letters[0]) for letter in letters[1:]] and str(counts[-1]) == answer
    if drawn.task == "largest":
        return all(step[3] == max(step[:2]) for step in steps.split()) and steps[-1] == answer
    if drawn.task == "add":
        equations = [equation.split("=") for equation in steps.split(", ")]
        return all(sum(map(int, left.split("+"))) == int(right) for left, right in equations) and equations[-1][1] == answer
    if drawn.task == "ends":
        return steps == "first {}, last {}".format(*answer.split())
    raise AssertionError(drawn.task)


@pytest.mark.parametrize("task", TASKS)
def test_answers_and_reasoning_are_right(task):
    for drawn in training_problems([task], 400, seed=3) + held_out_problems([task], 60, seed=3):
        assert solve(task, drawn.question) == drawn.answer, drawn
        assert reasoning_is_sound(drawn), drawn


def test_the_check_of_answers_notices_a_wrong_one():
    drawn = training_problem("sort", 0, seed=0)
    assert solve("sort", drawn.question) != drawn.answer[::-1]
    assert not reasoning_is_sound(Problem("sort", drawn.question, drawn.reasoning, drawn.answer[::-1]))


@given(st.sampled_from(TASKS), st.integers(0, 10**6), st.integers(0, 100))
def test_a_problem_depends_on_its_arguments_only(task, index, seed):
    assert problem(task, index, seed) == problem(task, index, seed)
    assert training_problem(task, index, seed).task == task


def operands(drawn: Problem) -> tuple[str, str]:
    return drawn.task, " ".join(letters_in(drawn.question)) + "|" + digits_in(drawn.question)


def test_held_out_problems_occur_in_no_training_text_in_any_phrasing():
    held_out = {operands(drawn) for seed in range(2) for drawn in held_out_problems(TASKS, 480, seed)}
    training = {operands(drawn) for seed in range(2) for drawn in training_problems(TASKS, 6000, seed)}
    assert len(held_out) > 700 and len(training) > 5000
    assert not held_out & training
    questions = {drawn.question for drawn in held_out_problems(TASKS, 480, seed=0)}
    texts = problem_texts(4000, 0) + [messages[0]["content"] for _, messages, _ in problem_dialogues(4000, 0)]
    assert not questions & {text.split("\n")[0].removeprefix("Question: ") for text in texts}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_forty_different_held_out_problems(task):
    drawn = held_out_problems([task], 40, seed=0)
    assert len({operands(one) for one in drawn}) == 40


def test_held_out_problems_take_the_tasks_in_turn():
    assert Counter(drawn.task for drawn in held_out_problems(TASKS, 80, seed=1)) == dict.fromkeys(TASKS, 10)


def test_asking_for_more_held_out_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="fewer than"):
        held_out_problems(["add"], 200, seed=0)  # 1000 sums, an eighth of them held out


def test_dialogues_of_every_task_come_with_and_without_thinking():
    seen = Counter()
    for _, (user, reply), thinks in problem_dialogues(2000, seed=0):
        assert ("reasoning_content" in reply) == thinks
        seen[thinks] += 1
    assert 0.08 < seen[False] / 2000 < 0.2


def test_problems_need_neither_torch_nor_transformers():
    code = "import sys, glm.data.problems; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
