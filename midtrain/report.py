"""What became of the material, to look at: RUN/data/STAGE_report.json, the same as .md with samples, and lines on the terminal."""

from collections import Counter
from pathlib import Path

from glm.checkpoint.run_folder import write_atomically, write_json

SAMPLES = 3
SAMPLE_LINES = 40
SAID = {"read": "read", "dropped": "documents not made", "left_out": "left out of documents"}


def report(stage: str, data: Path, facts: dict[str, list[dict]]) -> None:
    content = {name: summary(tasks) for name, tasks in facts.items()}
    write_json(data / f"{stage}_report.json", content)
    write_atomically(data / f"{stage}_report.md", as_markdown(stage, content))
    for name, corpus in content.items():
        sizes = corpus["buckets"].items()
        buckets = ", ".join(f"{bucket} {one['documents']:,} documents {one['tokens']:,} tokens" for bucket, one in sizes)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in corpus["dropped"].items())
        print(f"{stage}: {name}: {buckets}" + (f"; not made: {dropped}" if dropped else ""), flush=True)
    print(f"{stage}: report in {data / f'{stage}_report.md'}", flush=True)


def summary(tasks: list[dict]) -> dict:
    """Counts of one corpus over its tasks, and a few documents of each bucket."""
    counted = {key: sum((Counter(task[key]) for task in tasks), Counter()) for key in SAID}
    buckets: dict[str, Counter] = {}
    samples: dict[str, list[dict]] = {}
    for task in tasks:
        for bucket, shard in task["shards"].items():
            buckets.setdefault(bucket, Counter()).update(documents=shard["documents"], tokens=shard["tokens"])
            if len(samples.setdefault(bucket, [])) < SAMPLES:
                samples[bucket].append(task["samples"][bucket])
    return {
        "buckets": {bucket: dict(buckets[bucket]) for bucket in sorted(buckets)}, "broken_records": sum(task["broken"] for task in tasks),
        **{key: dict(sorted(count.items(), key=lambda item: -item[1])) for key, count in counted.items()}, "samples": samples,
    }


def as_markdown(stage: str, content: dict[str, dict]) -> str:
    lines = [f"# {stage}: what became of the material", ""]
    for name, corpus in content.items():
        lines += [f"## {name}", "", "| | documents | tokens |", "| --- | --: | --: |"]
        lines += [f"| {bucket} | {one['documents']:,} | {one['tokens']:,} |" for bucket, one in corpus["buckets"].items()]
        for key, said in SAID.items():
            counted = ", ".join(f"{count:,} {what}" for what, count in corpus[key].items())
            lines += ["", f"{said[0].upper()}{said[1:]}: {counted or 'nothing'}."]
        lines += ["", f"Broken records skipped: {corpus['broken_records']:,}.", ""]
        for bucket, samples in corpus["samples"].items():
            for sample in samples:
                shown = [f"    {line}" for line in sample["text"].split("\n")[:SAMPLE_LINES]]
                lines += [f"### {name}/{bucket}: {sample['label']}, {sample['tokens']:,} tokens", "", *shown, ""]
    return "\n".join(lines)
