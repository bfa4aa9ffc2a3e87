"""The whole path on shortened stages: raw text to a chatting, RL-tuned model, every stage real."""

import json
import shutil
import time

import psutil
import pytest

from tests.runs import TINY, glm, metrics, processes_of, started

LAYOUTS = (
    "pretrain_code_reasoning.layout.tp=2", "midtrain_repo_code.layout={pp: 2, ep: 1}", "midtrain_reasoning.layout.cp=2",
    "midtrain_long_context.layout={pp: 2, vpp: 2, ep: 1, cp: 1}", "sft_cold_start.layout.cp=2", "rl_reasoning.layout={tp: 2, ep: 1, etp: 2}",
)
"""Two ranks divided otherwise at every stage: each continues from a checkpoint of another layout."""
SHORTENED = (
    "pretrain_general.tokens=40960", "pretrain_code_reasoning.tokens=20480", "midtrain_repo_code.tokens=4096",
    "midtrain_reasoning.tokens=4096", "midtrain_long_context.tokens=4096", "midtrain_long_context.batch.tokens=4096",  # two rows
    "sft_cold_start.tokens=20480",
    "rl_reasoning.rl.steps=3", "rl_reasoning.rollout.prompts_per_step=16", "rl_reasoning.evaluation.prompts=16",
    "rl_reasoning.evaluation.samples=4", "rl_reasoning.rl.drop_uniform_groups=false",
    *LAYOUTS,
)
STAGES = (
    "tokenizer", "prepare_pretrain", "pretrain_general", "pretrain_code_reasoning", "prepare_midtrain", "midtrain_repo_code",
    "midtrain_reasoning", "midtrain_long_context", "sft_cold_start", "rl_reasoning", "export", "chat",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    done = glm("run", TINY, *SHORTENED, f"run_folder={folder}", timeout=800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


def test_every_stage_is_done_and_nothing_is_left_running(run):
    assert [stage for stage in STAGES if not (run / "stages" / stage / "done.json").exists()] == []
    assert processes_of(run) == []


def test_losses_of_the_trunk_and_of_the_mtp_layer_fall(run):
    for name in ("train/loss", "train/mtp_loss"):
        losses = metrics(run, "pretrain_general", name)
        assert losses[max(losses)] < losses[1] - 1.0


def test_the_router_bias_moves_in_the_first_stage_and_rests_after(run):
    first = metrics(run, "pretrain_general", "balance/bias_max")
    later = metrics(run, "pretrain_code_reasoning", "balance/bias_max")
    assert first[max(first)] > 5e-3
    assert set(later.values()) == {first[max(first)]}


def test_rollouts_agree_with_the_trainer_and_every_push_is_proved(run):
    differences = metrics(run, "rl_reasoning", "rl/logprob_difference_mean")
    assert len(differences) == 3 and max(differences.values()) < 1e-3
    proved = metrics(run, "rl_reasoning", "rl/sync_tensors_proved")
    assert len(proved) == 3 and min(proved.values()) == 2 * 70  # two engines: every tensor of target and draft
    assert metrics(run, "rl_reasoning", "rl/weight_version") == {1: 1, 2: 2, 3: 3}


def test_speculation_accepts_drafts(run):
    lengths = metrics(run, "rl_reasoning", "rl/acceptance_length")
    assert min(lengths.values()) > 1.0


def test_held_out_accuracy_is_told_before_and_after_with_its_error(run):
    for name in ("eval/sampled_accuracy", "eval/greedy_accuracy", "eval/sampled_standard_error", "eval/reverse/sampled"):
        assert set(metrics(run, "rl_reasoning", name)) == {0, 3}


def test_transformers_loads_the_export(run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Reverse: a b c"}], add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    assert model(ids).logits.shape == (1, ids.shape[1], 2048)


def test_trainer_transformers_and_sglang_give_the_same_ids(run):
    import requests
    from transformers import AutoTokenizer

    from glm.inference.server import EngineServer, ServerSpec
    from glm.tokenizer import encode_dialogue, encode_text, load_tokenizer

    ours, theirs = load_tokenizer(run / "tokenizer"), AutoTokenizer.from_pretrained(run / "export")
    texts = ["def f(x):\n    return x + 1\n", "Sort the digits: 4071", "naïve 数 🙂\t  tabs", "a" * 40]
    messages = [{"role": "user", "content": "Reverse: a b c"}]
    with EngineServer(ServerSpec(run / "export", "host", context_length=256), run / "tokenize.log") as server:
        server.wait_ready()

        def served(**request) -> list[int]:
            answer = requests.post(
                f"{server.url}/v1/tokenize", json={"model": "default", "add_special_tokens": False} | request, timeout=30,
                headers={"Authorization": f"Bearer {server.spec.api_key}"},
            )
            assert answer.status_code == 200, answer.text
            return answer.json()["tokens"]

        for text in texts:
            assert encode_text(ours, text) == theirs(text)["input_ids"] == served(prompt=text), text
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert encode_dialogue(ours, messages, add_generation_prompt=True)[0] == served(prompt=rendered)


def test_the_chat_stage_leaves_dialogues(run):
    lines = [json.loads(line) for line in (run / "stages" / "chat" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and all(line["prompt"] for line in lines)


def test_the_report_stands_alone_and_names_every_stage(run):
    page = (run / "report.html").read_text()
    without_metrics = ("tokenizer", "prepare_pretrain", "prepare_midtrain", "export", "chat")
    assert all(stage in page for stage in STAGES if stage not in without_metrics)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page.replace("https://www.w3.org", "")


def test_the_same_command_again_does_nothing(run):
    before = (run / "metrics.jsonl").read_bytes()
    done = glm("run", TINY, *SHORTENED, f"run_folder={run}", timeout=60)
    assert done.returncode == 0
    assert (run / "metrics.jsonl").read_bytes() == before


FOUR_STEPS = (
    *(word for word in SHORTENED if not word.startswith(("rl_reasoning.rl.steps=", "rl_reasoning.evaluation.prompts="))),
    "rl_reasoning.rl.steps=4", "rl_reasoning.checkpoint.every_steps=2", "rl_reasoning.evaluation.prompts=8",
)


@pytest.fixture(scope="module")
def killed_in_rl(run):
    """A copy of the run whose RL stage was killed with its engines after the checkpoint of step 2, and started again."""
    folder = run.parent / "killed"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("rl_reasoning", "export", "chat", ".lock"))
    process = started(folder, "rl_reasoning", *FOUR_STEPS)
    stage = folder / "stages" / "rl_reasoning"
    deadline = time.monotonic() + 200
    while not (stage / "checkpoints" / "step_00000002").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.05)
    descendants = [(child.pid, child.create_time()) for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    assert not (stage / "done.json").exists(), "killed too late to show anything"
    return folder, descendants


def test_no_rank_engine_or_worker_outlives_a_killed_launcher(killed_in_rl):
    _, descendants = killed_in_rl
    assert len(descendants) >= 4, "two ranks and two engines were expected"
    deadline = time.monotonic() + 20
    while (left := [one for one in descendants if is_running(*one)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_killed_rl_goes_on_from_its_checkpoint(killed_in_rl):
    folder, _ = killed_in_rl
    done = glm("run", TINY, "rl_reasoning", *FOUR_STEPS, f"run_folder={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues after step 2" in done.stdout
    assert metrics(folder, "rl_reasoning", "rl/weight_version") == {1: 1, 2: 2, 3: 3, 4: 4}
    assert processes_of(folder) == []


def is_running(pid: int, create_time: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == create_time and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
