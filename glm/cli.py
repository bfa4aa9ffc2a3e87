"""The command ``glm``. Verbs import what they need when they run: ``glm --help`` answers at once."""

import argparse
import sys
from collections.abc import Sequence

from glm.errors import REQUEUE_CODE, UserError, explain_os_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 fine, 1 something required is wrong (doctor), 2 a mistake told on stderr, 75 saved because the scheduler
    asked to stop, 130 interrupted."""
    options = _options(arguments)
    try:
        return options.verb(options) or 0
    except UserError as problem:
        print(f"glm {options.name}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nglm {options.name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:    # `glm show … | head` closed the pipe: nobody is left to tell
        sys.stderr.close()
        return 0
    except OSError as problem:
        explained = explain_os_error(problem)
        if explained is None:
            raise
        print(f"glm {options.name}: {explained}", file=sys.stderr)
        return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes positional words only in one piece; here ``RUNFILE --dry-run KEY=VALUE`` is as good as any order."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or rest and not hasattr(options, "words"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words = [*options.words, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="glm", description="Trains GLM-4.5 models from raw text to chat.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, function, summary: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, help=summary, description=summary, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.set_defaults(verb=function, name=name)
        return added

    run = verb(
        "run", _run, "run the stages that are not yet done, in order", "glm run configs/glm45/tiny.yaml data.documents=~/notes run_folder=runs/mine"
    )
    run.add_argument("runfile", metavar="RUNFILE")
    run.add_argument("words", nargs="*", metavar="STAGE|KEY=VALUE", help="only these stages; recipe keys to change")
    run.add_argument("--dry-run", action="store_true", help="print the torchrun line of each stage, a Slurm job, its submission and a requeue loop")
    run.add_argument("--write", action="store_true", help="with --dry-run: write these scripts to RUN/launch")

    show = verb("show", _show, "the resolved recipe of a stage, with the origin of each value", "glm show configs/glm45/air.yaml pretrain_general")
    show.add_argument("runfile", metavar="RUNFILE")
    show.add_argument("words", nargs="*", metavar="STAGE|KEY=VALUE")
    show.add_argument("--schedule", action="store_true", help="learning rate, batch and the rest over the tokens of all stages")
    show.add_argument("--at", action="append", default=[], metavar="TOKENS", help="the schedules at these run tokens (15T), once or more")
    show.add_argument("--plot", metavar="PATH", help="where the picture of --schedule goes (.svg, .png, .pdf); default RUN/schedule.svg")
    show.add_argument("--paper", action="store_true", help="the recipe beside the report's numbers: equal, differs, open")
    show.add_argument("--json", action="store_true", help="one JSON object a line")

    check = verb("check", _check, "are the recipes valid, and how large is what they describe", "glm check configs/glm45/*.yaml")
    check.add_argument("words", nargs="*", metavar="RUNFILE|KEY=VALUE", help="default: every run file in configs/glm45")
    check.add_argument("--json", action="store_true", help="one JSON object a run file")

    chat = verb("chat", _chat, "talk to an exported model", "glm chat runs/tiny")
    chat.add_argument("folder", metavar="RUNFOLDER|HF_FOLDER")

    doctor = verb("doctor", _doctor, "what this machine has, what disagrees, what breaks as a result", "glm doctor")
    doctor.add_argument("--json", action="store_true", help="one JSON object a finding")

    report = verb("report", _report, "one self-contained page with the curves of a run", "glm report runs/tiny")
    report.add_argument("folder", metavar="RUNFOLDER")
    return parser


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stages (or files) and KEY=VALUE changes, each in order."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _run(options: argparse.Namespace) -> int:
    import signal
    from glm.launch.local import Interrupted
    from glm.launch.signals import Requeued
    from glm.launch.stages import run_stages, select
    from glm.recipe.compose import load_run

    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job inherits a SIGINT that is ignored
    stages, changes = split_words(options.words)
    run = load_run(options.runfile, changes)
    if options.dry_run or options.write:
        return _print_scripts(run, select(run, stages), changes, write=options.write)
    try:
        run_stages(run, stages, say=lambda text: print(f"glm run: {text}", flush=True))
    except Interrupted as stage:
        print(f"\nglm run: stopped in {stage}; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    except Requeued as stopped:
        how = "saved" if stopped.saved else "it was stopped before it could save; its newest checkpoint is kept"
        print(f"glm run: {stopped.stage}: asked to stop: {how}; the same command continues", file=sys.stderr)
        return REQUEUE_CODE
    return _write_report(run.run_folder)


def _print_scripts(run, stages: list[str], changes: list[str], *, write: bool) -> int:
    """A dry run: what would start the stages. Nothing is written unless ``write``, and then nothing but the scripts."""
    from pathlib import Path

    from glm.checkpoint.run_folder import write_atomically
    from glm.launch.scripts import FOLDER, ranks_by_hand, scripts

    print("glm run: the recipe.json files named below are written by `glm run`, each when its stage starts", file=sys.stderr)
    folder = Path(run.run_folder) / FOLDER
    print(f"# ---- the ranks of each stage, by hand ----\n{ranks_by_hand(run, stages)}")
    for name, text in scripts(run, stages, changes).items():
        print(f"# ---- {folder / name} ----\n{text}")
        if write:
            write_atomically(folder / name, text)
            (folder / name).chmod(0o755)
            print(f"glm run: {folder / name}", file=sys.stderr)
    return 0


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    return _write_report(Path(options.folder))


def _write_report(folder) -> int:
    from glm.metrics.report import write_report

    print(f"glm report: {write_report(folder)}")
    return 0


def _show(options: argparse.Namespace) -> int:
    stages, changes = split_words(options.words)
    if options.schedule or options.at or options.plot:
        from glm.show.schedule import show_schedule

        return show_schedule(options.runfile, stages, changes, as_json=options.json, at=options.at, plot=options.plot)
    if options.paper:
        from glm.show.paper import show_paper

        return show_paper(options.runfile, stages, changes, as_json=options.json)
    from glm.show.recipe import show_recipe

    return show_recipe(options.runfile, stages, changes, as_json=options.json)


def _check(options: argparse.Namespace) -> int:
    from glm.check import check_runs

    files, changes = split_words(options.words)
    return check_runs(files, changes, as_json=options.json)


def _chat(options: argparse.Namespace) -> int:
    from pathlib import Path

    from glm.inference.chat import chat

    return chat(Path(options.folder)) or 0


def _doctor(options: argparse.Namespace) -> int:
    from glm.doctor import diagnose

    return diagnose(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
