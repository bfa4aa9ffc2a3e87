"""What the prepare stage did, to look at: RUN/data/prepare_report.json, the same as .md, and a table on the terminal."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from glm.checkpoint.run_folder import write_atomically, write_json
from pretrain.buckets import SCORE_BINS
from pretrain.reading import SAMPLE_CHARACTERS, Readings

SAMPLES = 5
"""Documents shown for each source and reason."""
PAIRS = 8
"""Pairs of duplicates shown for each kind."""
SHOWN_BINS = 20
STEPS = ("empty", "short", "language", "exact", "near", "quality", "semantic")
"""Why a document may be dropped, in the order of the steps."""


def report(stage: str, data: Path, names: tuple[str, ...], owners: tuple[str, ...], facts: dict) -> None:
    """Writes the report of a finished preparation and prints its table."""
    sources = {name: _source(name, owners, facts) for name in names}
    content = {"stage": stage, "sources": sources, "duplicates": _pairs(facts["steps"], facts["readings"])}
    write_json(data / "prepare_report.json", content)
    write_atomically(data / "prepare_report.md", as_markdown(content))
    _print(stage, sources)
    print(f"{stage}: report in {data / 'prepare_report.md'}", flush=True)


def _source(name: str, owners: tuple[str, ...], facts: dict) -> dict:
    """Counts of one source over its tasks."""
    mine = [task for task, owner in zip(facts["read"], owners) if owner == name]
    documents, sizes, samples = defaultdict(int), defaultdict(int), defaultdict(list)
    for step in ("read", "written"):
        for task in mine:
            for reason, count in facts[step][task]["documents"].items():
                documents[reason] += count
                sizes[reason] += facts[step][task]["bytes"][reason]
            for reason, some in facts[step][task]["samples"].items():
                samples[reason] += some[: SAMPLES - len(samples[reason])]
    buckets = {}
    for bucket, first in reversed(facts["quality"][name]["edges"]):
        parts = [facts["written"][task]["written"][bucket] for task in mine if bucket in facts["written"][task]["written"]]
        buckets[bucket] = {"lowest_score": first / SCORE_BINS} | {
            key: sum(part[key] for part in parts) for key in ("documents", "tokens", "bytes", "rearranged", "control_strings")
        }
    histogram = np.array(facts["quality"][name]["histogram"]).reshape(SHOWN_BINS, -1).sum(axis=1)
    return {
        "documents_read": documents["read"], "bytes_read": sizes["read"], "broken_records": documents["broken"],
        "dropped": {reason: {"documents": documents[reason], "bytes": sizes[reason]} for reason in STEPS if documents[reason]},
        "buckets": buckets, "bytes_by_score": histogram.tolist(), "samples": dict(samples),
    }


def _pairs(steps: list[tuple[str, Path]], readings: Readings) -> dict[str, list[dict]]:
    """For each kind of duplicates a few pairs of a kept and a dropped document."""
    shown = {}
    for reason, alive in steps:
        if reason != "quality":
            dropped = np.load(alive.with_name("dropped.npy"))
            some = dropped[np.linspace(0, len(dropped) - 1, min(PAIRS, len(dropped))).astype(int)].tolist()
            texts = readings.some_texts([number for pair in some for number in pair])
            shown[reason] = [
                {side: {"name": texts[number][0], "text": texts[number][1][:SAMPLE_CHARACTERS]} for side, number in zip(("kept", "dropped"), pair)}
                for pair in some
            ]
    return shown


def as_markdown(content: dict) -> str:
    lines = [f"# {content['stage']}: what became of the raw text", ""]
    for name, source in content["sources"].items():
        lines += [f"## {name}", "", "| | documents | bytes | tokens |", "| --- | --: | --: | --: |"]
        lines.append(f"| read | {source['documents_read']:,} | {source['bytes_read']:,} | |")
        lines += [f"| dropped: {reason} | {count['documents']:,} | {count['bytes']:,} | |" for reason, count in source["dropped"].items()]
        lines += [
            f"| bucket {bucket} (score from {count['lowest_score']:.3f}) | {count['documents']:,} | {count['bytes']:,} | {count['tokens']:,} |"
            for bucket, count in source["buckets"].items()
        ]
        rearranged = sum(count["rearranged"] for count in source["buckets"].values())
        spelled = sum(count["control_strings"] for count in source["buckets"].values())
        lines += ["", f"Broken records skipped: {source['broken_records']:,}. Documents told with their middle last: {rearranged:,}. "
                  f"Control tokens spelled out in text, encoded as text: {spelled:,}.", ""]
        most = max(1, *source["bytes_by_score"])
        lines += ["Bytes by score:", "", "```"]
        lines += [f"{place / SHOWN_BINS:.2f} {size:>16,} {'#' * round(40 * size / most)}" for place, size in enumerate(source["bytes_by_score"])]
        lines += ["```", ""]
        for reason, samples in sorted(source["samples"].items()):
            lines += [f"### {name}: {reason}", ""]
            for sample in samples:
                told = ", ".join(f"{key} {value}" for key, value in sample.items() if key not in ("name", "text"))
                lines += [f"`{sample['name']}`{f' ({told})' if told else ''}", "", *_quoted(sample["text"]), ""]
    for reason, pairs in content["duplicates"].items():
        lines += [f"## Duplicates: {reason}", ""]
        for pair in pairs:
            for side in ("kept", "dropped"):
                lines += [f"{side} `{pair[side]['name']}`", "", *_quoted(pair[side]["text"]), ""]
    return "\n".join(lines)


def _quoted(text: str) -> list[str]:
    return [f"    {line}" for line in text.split("\n")[:12]]


def _print(stage: str, sources: dict[str, dict]) -> None:
    table = Table(title=f"{stage}: documents", title_justify="left", box=None, pad_edge=False)
    reasons = [reason for reason in STEPS if any(reason in source["dropped"] for source in sources.values())]
    for column in ("source", "read", "broken", *reasons, "bucket", "kept", "tokens", "MB"):
        table.add_column(column, justify="left" if column in ("source", "bucket") else "right")
    for name, source in sources.items():
        told = [name, f"{source['documents_read']:,}", f"{source['broken_records']:,}"]
        told += [f"{source['dropped'].get(reason, {'documents': 0})['documents']:,}" for reason in reasons]
        for bucket, count in source["buckets"].items():
            table.add_row(*told, bucket, f"{count['documents']:,}", f"{count['tokens']:,}", f"{count['bytes'] / 1e6:.2f}")
            told = [""] * len(told)
    Console(width=140).print(table)
