"""Small verifiable problems, drawn procedurally: a question, a few words of reasoning, and one exact answer.

They are what a model of two million parameters can learn to think about. Letters are written with a space before each
and digits stand alone, so that every letter and digit is one token.

A problem's *key* is its task and operands, whatever the phrasing. Keys whose digest is 0 modulo 8 are held out: no
training text ever contains them. Imports the standard library only.
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LETTERS = "abcdefghijkl"
HELD_OUT_MODULUS = 8
DRAWS_FOR_A_NEW_ONE = 1000
"""After so many held-out problems that were all seen before, a task is taken to have no more."""


@dataclass(frozen=True)
class Problem:
    task: str
    question: str
    reasoning: str
    answer: str
    key: str = ""
    """Task and operands, whatever the phrasing."""


@dataclass(frozen=True)
class _Draft:
    """One drawn problem before a phrasing is chosen: ``operands`` fill the phrasings' fields and make the key."""

    operands: dict[str, str]
    reasoning: str
    answer: str


def _letters(rng: random.Random, shortest: int, longest: int) -> list[str]:
    return [rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest))]


def _reverse(rng: random.Random) -> _Draft:
    letters = _letters(rng, 3, 5)
    backwards = letters[::-1]
    return _Draft({"letters": " ".join(letters)}, "from the end: " + ", ".join(backwards), " ".join(backwards))


def _sort(rng: random.Random) -> _Draft:
    digits = rng.sample("0123456789", rng.randint(3, 5))
    ordered = sorted(digits)
    return _Draft({"digits": "".join(digits)}, "<".join(ordered), "".join(ordered))


def _upper(rng: random.Random) -> _Draft:
    letters = _letters(rng, 3, 5)
    capitals = [letter.upper() for letter in letters]
    pairs = ", ".join(f"{small} {capital}" for small, capital in zip(letters, capitals))
    return _Draft({"letters": " ".join(letters)}, pairs, " ".join(capitals))


def _count(rng: random.Random) -> _Draft:
    few = rng.sample(LETTERS, 3)  # few different letters, so that the asked one is often there
    letters = [rng.choice(few) for _ in range(rng.randint(4, 6))]
    asked = few[0]
    running = [letters[: end + 1].count(asked) for end in range(len(letters))]
    steps = " ".join(f"{letter}{count}" for letter, count in zip(letters, running))
    return _Draft({"letter": asked, "letters": " ".join(letters)}, steps, str(running[-1]))


def _largest(rng: random.Random) -> _Draft:
    digits = [rng.choice("0123456789") for _ in range(rng.randint(3, 4))]
    best, steps = digits[0], []
    for digit in digits[1:]:
        winner = max(best, digit)
        steps.append(f"{best}{digit}:{winner}")
        best = winner
    return _Draft({"digits": "".join(digits)}, " ".join(steps), best)


def _add(rng: random.Random) -> _Draft:
    numbers = [rng.randint(0, 9) for _ in range(3)]
    first, second, third = numbers
    part = first + second
    return _Draft(
        {"sum": "+".join(map(str, numbers))}, f"{first}+{second}={part}, {part}+{third}={part + third}", str(part + third)
    )


def _ends(rng: random.Random) -> _Draft:
    letters = _letters(rng, 3, 6)
    return _Draft(
        {"letters": " ".join(letters)}, f"first {letters[0]}, last {letters[-1]}", f"{letters[0]} {letters[-1]}"
    )


def _following(rng: random.Random) -> _Draft:
    letters = _letters(rng, 2, 4)
    after = [chr(ord(letter) + 1) for letter in letters]
    pairs = ", ".join(f"{letter} {following}" for letter, following in zip(letters, after))
    return _Draft({"letters": " ".join(letters)}, pairs, " ".join(after))


_TASKS: dict[str, tuple[Callable[[random.Random], _Draft], tuple[str, ...]]] = {
    "reverse": (_reverse, ("Reverse: {letters}", "Write backwards: {letters}", "Say {letters} from the end.")),
    "sort": (_sort, ("Sort the digits: {digits}", "Put in order: {digits}", "Order {digits} from small to large.")),
    "upper": (_upper, ("In capitals: {letters}", "Make upper case: {letters}", "Write {letters} in capitals.")),
    "count": (_count, (
        "Count {letter} in: {letters}", "How many {letter} are in {letters}?", "How often is {letter} in {letters}?",
    )),
    "largest": (_largest, ("Largest digit: {digits}", "Which digit of {digits} is largest?", "Find the largest of {digits}.")),
    "add": (_add, ("Add: {sum}", "What is {sum}?", "Work out {sum}.")),
    "ends": (_ends, ("First and last: {letters}", "First and last letter of {letters}?", "How does {letters} begin and end?")),
    "following": (_following, ("Next letters: {letters}", "What follows each of {letters}?", "After each of {letters} comes?")),
}
TASKS: tuple[str, ...] = tuple(_TASKS)


def problem_key(task: str, operands: Iterable[str]) -> str:
    return f"{task}: {' | '.join(operands)}"


def is_held_out(key: str) -> bool:
    return int.from_bytes(hashlib.md5(key.encode()).digest(), "big") % HELD_OUT_MODULUS == 0


def _draw(task: str, index: int, seed: int, attempt: int) -> Problem:
    draw, phrasings = _TASKS[task]
    rng = random.Random(f"{seed}/{task}/{index}/{attempt}")
    draft = draw(rng)
    question = rng.choice(phrasings).format(**draft.operands)
    return Problem(task, question, draft.reasoning, draft.answer, problem_key(task, draft.operands.values()))


def problem(task: str, index: int, seed: int) -> Problem:
    """The problem number ``index`` of a task, held out or not: a pure function of its arguments."""
    return _draw(task, index, seed, 0)


def _draw_where(task: str, index: int, seed: int, held_out: bool) -> Problem:
    attempt = 0
    while True:
        candidate = _draw(task, index, seed, attempt)
        if is_held_out(candidate.key) == held_out:
            return candidate
        attempt += 1


def training_problem(task: str, index: int, seed: int) -> Problem:
    """The training problem number ``index`` of a task; never a held-out one."""
    return _draw_where(task, index, seed, held_out=False)


def training_problems(tasks: Iterable[str], count: int, seed: int) -> list[Problem]:
    """``count`` training problems, the tasks in turn. A problem may come twice."""
    tasks = tuple(tasks)
    return [training_problem(tasks[i % len(tasks)], i // len(tasks), seed) for i in range(count)]


def held_out_problems(tasks: Iterable[str], count: int, seed: int) -> list[Problem]:
    """``count`` held-out problems with different keys, the tasks in turn.

    Raises ValueError if a task has too few: every task has at least 100.
    """
    tasks = tuple(tasks)
    chosen: list[Problem] = []
    seen: set[str] = set()
    next_index = dict.fromkeys(tasks, 0)
    for i in range(count):
        task = tasks[i % len(tasks)]
        for index in range(next_index[task], next_index[task] + DRAWS_FOR_A_NEW_ONE):
            candidate = _draw_where(task, index, seed, held_out=True)
            if candidate.key not in seen:
                break
        else:
            raise ValueError(f"task {task} has fewer than {i // len(tasks) + 1} held-out problems")
        next_index[task] = index + 1
        seen.add(candidate.key)
        chosen.append(candidate)
    return chosen
