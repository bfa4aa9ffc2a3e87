"""The seconds of a stage's phases, as its loop logs them."""

import json

from tests.train.forked import completed, part_of


def test_a_thinned_line_tells_the_phases_of_all_its_steps(whole, text):
    folder = part_of(whole, "thinned", (2,))
    completed(folder, text, "logging.every_steps=3", "logging.detail_every_steps=0")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train/step_seconds" in line}
    assert list(steps) == [3, 6, 8]
    parts = {step: line["phase/forward_backward_seconds"] + line["phase/optimizer_seconds"] for step, line in steps.items()}
    assert parts[3] < steps[3]["train/step_seconds"], "one step"
    assert parts[6] > steps[6]["train/step_seconds"] or parts[8] > steps[8]["train/step_seconds"], "three and two"
