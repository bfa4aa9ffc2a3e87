import pytest

from glm.data.problems import TASKS, Problem
from glm.errors import RecipeError
from posttrain.environments import environment
from posttrain.rewards.exact import reward

PROBLEM = Problem("sort", "Sort the digits: 312", "1<2<3", "123")


@pytest.mark.parametrize("reply", [
    "\n<think>1<2<3</think>\n123<|user|>", "\n<think></think>\n123", "\n123", "<think>a</think>b</think>  123 \n<|endoftext|>",
])
def test_the_exact_answer_after_the_last_thought_is_rewarded(reply):
    assert reward(reply, PROBLEM) == 1.0


@pytest.mark.parametrize("reply", [
    "", "\n<think>123", "\n<think>123</think>\n", "\n<think>1<2<3</think>\n1234<|user|>", "\n<think>x</think>\n1 2 3",
    "\n<think>x</think>\n123 or 321", "\n<think>x</think>\n123<|user|>\n5<|user|>", "\n<think>x</think>\n<think>123",
])
def test_anything_else_is_not(reply):
    assert reward(reply, PROBLEM) == 0.0


def test_prompts_are_pure_functions_of_index_and_seed_and_take_the_tasks_in_turn():
    problems = environment("problems")
    prompts = [problems.training_prompt(index, seed=5) for index in range(64)]
    assert prompts == [environment("problems").training_prompt(index, seed=5) for index in range(64)]
    assert [prompt.task for prompt in prompts[: len(TASKS)]] == list(TASKS)
    assert prompts != [problems.training_prompt(index, seed=6) for index in range(64)]


def test_held_out_prompts_are_different_from_each_other_and_from_training():
    problems = environment("problems")
    held_out = [prompt.problem.question for prompt in problems.held_out(240, seed=0)]
    assert len(set(held_out)) == 240
    assert not set(held_out) & {problems.training_prompt(index, seed=0).problem.question for index in range(4000)}


def test_the_environment_scores_its_own_demonstrations():
    problems = environment("problems")
    for prompt in problems.held_out(40, seed=1):
        reply = f"\n<think>{prompt.problem.reasoning}</think>\n{prompt.problem.answer}<|user|>"
        assert problems.score(prompt, reply) == 1.0
        assert problems.score(prompt, reply.replace("\n" + prompt.problem.answer, "\n?")) == 0.0


def test_an_unknown_environment_lists_the_known_ones():
    with pytest.raises(RecipeError, match="'maze'(.|\n)*problems"):
        environment("maze")
