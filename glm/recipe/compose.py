"""A run file and its axis files -> one frozen, typed recipe a stage.

Order, later wins: model file, stage file, hardware file (each may set only its own sections), defaults of the run file,
the run file's entry for the stage, what the run file says for this hardware file (``with_hardware``), ``KEY=VALUE`` from the
command line.
"""

from dataclasses import dataclass
from pathlib import Path

from glm.errors import RecipeError
from glm.recipe.check import check_stage
from glm.recipe.mixture import read_mixture
from glm.recipe.overrides import Override, parse_overrides
from glm.recipe.saved import chained_fingerprint, dump_recipe, fingerprint, load_recipe
from glm.recipe.schema import (
    RECIPE_OF_MAIN, ChatRecipe, ExportRecipe, ModelStageRecipe, PreparingRecipe, RLRecipe, StageRecipe, TokenizerRecipe, TrainRecipe,
)
from glm.recipe.source import Placed, merge, nearest, origins, read_yaml, shown
from glm.recipe.typed import build, check_keys, field_types

__all__ = ["Run", "load_run", "load_recipe", "dump_recipe", "fingerprint"]

HARDWARE_SECTIONS = {"platform", "launcher", "device", "precision", "kernels", "layout", "recompute"}
FILLED_IN = {"name", "stage", "from", "run_folder", "run_tokens_before"}
"""Keys that only the run file decides."""
ALL_SECTIONS = set().union(*(field_types(kind) for kind in RECIPE_OF_MAIN.values()))
RUN_KEYS = {"name", "run_folder", "model", "hardware", "stages", "with_hardware"}
STAGE_SECTIONS = ALL_SECTIONS - HARDWARE_SECTIONS - FILLED_IN - {"model", "seed", "logging"}


@dataclass(frozen=True)
class Run:
    """All stages of one model's life, in order."""

    name: str
    run_folder: Path
    path: Path
    stages: dict[str, StageRecipe]
    origins: dict[str, dict[str, str]]
    """Stage -> dotted key -> ``file:line`` or ``command line``; a key that is not here has its default."""

    def needs(self, stage: str) -> tuple[str, ...]:
        """Stages whose results this one reads: its parent, the tokenizer that comes before it, and those that prepared its sources."""
        recipe, before = self.stages[stage], list(self.stages)[: list(self.stages).index(stage)]
        tokenizers = [name for name in before if isinstance(self.stages[name], TokenizerRecipe)][-1:]
        corpora = [source.corpus for source in recipe.data.sources.values()] if isinstance(recipe, TrainRecipe) else []
        read = {corpus.split("/")[0] for corpus in corpora if "/" in corpus}    # without one it is built in, whatever a stage prepares
        prepared = [name for name in before if isinstance(self.stages[name], PreparingRecipe) and read & set(self.stages[name].prepares)]
        return tuple(dict.fromkeys(([recipe.parent] if recipe.parent else []) + tokenizers + prepared))

    def fingerprints(self) -> dict[str, str]:
        """Of every stage, over its recipe and those of all stages it builds on."""
        done: dict[str, str] = {}
        for stage, recipe in self.stages.items():
            done[stage] = chained_fingerprint(recipe, [done[name] for name in self.needs(stage)])
        return done


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """Reads a run file. Raises RecipeError with file and line for whatever is wrong in it or in the files it names."""
    path = Path(path)
    changes = parse_overrides(overrides)
    for change in changes:
        if change.key == "stages":
            raise RecipeError(change.origin, "`stages` on the command line", "stages named as words", "glm run RUNFILE STAGE ..., or change the run file")
        if change.key == "with_hardware":
            raise RecipeError(change.origin, "`with_hardware` on the command line", "the keys themselves", "STAGE.SECTION.KEY=VALUE")
    run = read_yaml(path).value | {change.key: change.value for change in changes if change.key in RUN_KEYS - {"stages"}}
    defaults = _run_defaults(run, shown(path))
    name = str(run["name"].value) if "name" in run else path.stem
    run_folder = Path(str(run["run_folder"].value) if "run_folder" in run else f"runs/{name}").expanduser().absolute()
    entries = _entries(run["stages"])
    composer = _Composer(path.parent, run, defaults, _with_hardware(run, entries))
    drafts = {stage: composer.draft(stage, entry) for stage, entry in entries.items()}
    kinds = {stage: _kind_of(draft, stage) for stage, draft in drafts.items()}
    for change in changes:
        if change.key not in RUN_KEYS:
            _apply(change, drafts, kinds)
    stages: dict[str, StageRecipe] = {}
    for stage, draft in drafts.items():
        check_keys(kinds[stage], draft)
        draft = _with_paths(draft)
        parent = _parent(stage, draft, stages)
        filled = {"name": name, "stage": stage, "from": parent, "run_folder": str(run_folder)}
        if issubclass(kinds[stage], ModelStageRecipe):
            filled["run_tokens_before"] = _tokens_up_to(parent, stages)
        draft = merge(draft, Placed({key: Placed(value, shown(path)) for key, value in filled.items()}, draft.origin))
        drafts[stage] = draft = _with_rollout_batch(_with_mixture(draft, path.parent), kinds[stage])
        stages[stage] = build(kinds[stage], draft)
    places = {stage: origins(draft) for stage, draft in drafts.items()}
    for stage, recipe in stages.items():
        check_stage(recipe, places[stage], _tokenizer_size(stages))
    return Run(name, run_folder, path, stages, places)


class _Composer:
    """Merges the axis files of one run file; each file is read once."""

    def __init__(self, folder: Path, run: dict[str, Placed], defaults: Placed, exceptions: dict[str, tuple[Placed, dict[str, Placed]]]):
        """``exceptions``: hardware file -> what holds on it for all stages, and for single ones."""
        self.folder, self.run, self.defaults, self.exceptions = folder, run, defaults, exceptions
        self._read: dict[Path, Placed] = {}
        for name, (everywhere, _) in exceptions.items():
            self._axis("hardware", Placed(name, everywhere.origin), HARDWARE_SECTIONS)

    def draft(self, stage: str, entry: Placed) -> Placed:
        stage_file = entry.value.get("stage", Placed(stage, entry.origin))
        hardware = entry.value.get("hardware") or self.run["hardware"]
        axes = merge(self._axis("model", self.run["model"], {"model"}), self._axis("stage", stage_file, STAGE_SECTIONS))
        axes = merge(axes, self._axis("hardware", hardware, HARDWARE_SECTIONS))
        kind = _kind_of(axes, stage)
        own = Placed({key: child for key, child in entry.value.items() if key not in ("stage", "hardware")}, entry.origin)
        shared = merge(axes, _of_kind(self.defaults, kind))
        merged = merge(shared if issubclass(kind, ModelStageRecipe) else _one_rank(shared), own)
        if hardware.value in self.exceptions:
            everywhere, single = self.exceptions[hardware.value]
            everywhere = _of_kind(everywhere, kind)
            merged = merge(merged, everywhere if issubclass(kind, ModelStageRecipe) else _one_rank(everywhere))
            merged = merge(merged, single.get(stage, Placed({}, everywhere.origin)))
        check_keys(kind, merged)    # not before: the variant of a section may be named in one file and set in another
        return merged

    def _axis(self, axis: str, named: Placed, allowed: set[str]) -> Placed:
        path = self.folder / axis / f"{named.value}.yaml"
        if not path.is_file():
            known = [other.stem for other in path.parent.glob("*.yaml")]
            raise RecipeError(named.origin, f"{axis} {str(named.value)!r}", f"a file {shown(path)}", nearest(str(named.value), known))
        if path not in self._read:
            placed = read_yaml(path)
            for key, child in placed.value.items():
                if key not in allowed:
                    raise RecipeError(child.origin, f"`{key}` in a {axis} file", f"only {', '.join(sorted(allowed))}", _home(key))
            self._read[path] = placed
        return self._read[path]


def _of_kind(placed: Placed, kind: type[StageRecipe]) -> Placed:
    """The sections a stage of this kind has."""
    return Placed({key: child for key, child in placed.value.items() if key in field_types(kind)}, placed.origin)


def _home(key: str) -> str:
    """Where a key belongs that was found in the wrong file."""
    if key == "model":
        return "move it to the model file"
    if key in HARDWARE_SECTIONS:
        return "move it to the hardware file, or to the run file if it holds for this run only"
    if key in STAGE_SECTIONS:
        return "move it to the stage file, or to the run file if it holds for this run only"
    return nearest(key, ALL_SECTIONS) if key not in ALL_SECTIONS else "set it in the run file"


def _run_defaults(run: dict[str, Placed], name: str) -> Placed:
    """Sections at the top of the run file. Raises for an unknown or a missing key."""
    for key in ("model", "hardware", "stages"):
        if key not in run:
            raise RecipeError(name, f"no `{key}`", "name, model, hardware and stages", f"add `{key}:`")
        if key != "stages" and run[key].is_map:
            raise RecipeError(run[key].origin, f"`{key}` is a map", f"the name of a file in {key}/", f"move the map to {key}/NAME.yaml")
    known = RUN_KEYS | (ALL_SECTIONS - FILLED_IN - {"main"})
    for key, child in run.items():
        if key not in known:
            raise RecipeError(child.origin, f"unknown key `{key}`", "a key of a run file", nearest(key, known))
    return Placed({key: child for key, child in run.items() if key not in RUN_KEYS}, f"{name}:1")


def _with_hardware(run: dict[str, Placed], entries: dict[str, Placed]) -> dict[str, tuple[Placed, dict[str, Placed]]]:
    """What the run file says for single hardware files, each written as a run file is: sections for all stages, and ``stages``."""
    known, exceptions = (ALL_SECTIONS - FILLED_IN - {"main", "model", "seed"}), {}
    named = run.get("with_hardware", Placed({}, ""))
    for name, said in named.value.items() if named.is_map else {"with_hardware": named}.items():
        if not said.is_map:
            raise RecipeError(said.origin, f"{name}: {said.value}", "a map", "write `with_hardware: {HARDWARE: {layout: {…}, stages: {…}}}`")
        everywhere = {key: child for key, child in said.value.items() if key != "stages"}
        for key, child in everywhere.items():
            if key not in known:
                raise RecipeError(child.origin, f"unknown key `{key}` with hardware {name}", "a section of a stage, or stages", nearest(key, known))
        single = _entries(said.value["stages"]) if "stages" in said.value else {}
        for stage, entry in single.items():
            if stage not in entries:
                raise RecipeError(entry.origin, f"stage {stage!r} with hardware {name}", "a stage of this run file", nearest(stage, entries))
        exceptions[name] = (Placed(everywhere, said.origin), single)
    return exceptions


def _entries(stages: Placed) -> dict[str, Placed]:
    """The stages of the run file, each a map."""
    if not stages.is_map or not stages.value:
        raise RecipeError(stages.origin, f"stages: {stages.value}", "a map of stage names", "write `pretrain_general: {}` lines")
    for stage, entry in stages.value.items():
        if not entry.is_map:
            raise RecipeError(entry.origin, f"{stage}: {entry.value}", "a map", f"write `{stage}: {{}}` for a stage without exceptions")
        for key, why in (("model", "all stages train the same model"), ("main", "a main belongs to its stage file"), ("seed", "it is one a run")):
            if key in entry.value:
                raise RecipeError(entry.value[key].origin, f"`{key}` in a stage entry", why, "set it where the whole run sees it")
    return stages.value


def _kind_of(draft: Placed, stage: str) -> type[StageRecipe]:
    main = draft.value.get("main")
    if main is None:
        raise RecipeError(draft.origin, f"stage {stage} has no `main`", "the module that runs it", f"one of {', '.join(RECIPE_OF_MAIN)}")
    if main.value not in RECIPE_OF_MAIN:
        raise RecipeError(main.origin, f"main: {main.value}", "a module with a recipe type", nearest(str(main.value), RECIPE_OF_MAIN))
    return RECIPE_OF_MAIN[main.value]


def _one_rank(shared: Placed) -> Placed:
    """Tokenizer, export and chat run as one rank, whatever is said for all stages; their own entry may say more."""
    sections = {key: child for key, child in shared.value.items() if key != "layout"}
    launcher = sections.get("launcher")
    if launcher is not None and launcher.is_map:
        kept = {key: child for key, child in launcher.value.items() if key not in ("nodes", "ranks_per_node")}
        sections["launcher"] = Placed(kept, launcher.origin)
    return Placed(sections, shared.origin)


def _apply(change: Override, drafts: dict[str, Placed], kinds: dict[str, type[StageRecipe]]) -> None:
    """Merges one KEY=VALUE into every stage it speaks of, in place."""
    stage, key = change.target(kinds)
    if key in FILLED_IN or key == "main" or (key == "model" and stage):
        raise RecipeError(change.origin, f"`{key}` of a stage", "a key of its sections", "set it in the run file")
    chosen = [stage] if stage else [name for name, kind in kinds.items() if key in field_types(kind)]
    placed = change.nested(stage)
    if not stage:    # a key inside a section that only some kinds of stage have is for those
        chosen = [name for name in chosen if _has_keys(kinds[name], placed, drafts[name])] or chosen
    for name in chosen:
        everywhere = not stage and not issubclass(kinds[name], ModelStageRecipe)
        drafts[name] = merge(drafts[name], _one_rank(placed) if everywhere else placed)
        check_keys(kinds[name], drafts[name])


def _has_keys(kind: type[StageRecipe], placed: Placed, draft: Placed) -> bool:
    try:
        check_keys(kind, merge(draft, placed))
    except RecipeError:
        return False
    return True


def _with_paths(draft: Placed) -> Placed:
    """Relative paths of the user's documents are relative to where the command is typed."""
    documents = draft.value["data"].value.get("documents") if "data" in draft.value else None
    if documents is None or documents.value is None:
        return draft
    absolute = Placed(str(Path(str(documents.value)).expanduser().absolute()), documents.origin)
    return merge(draft, Placed({"data": Placed({"documents": absolute}, documents.origin)}, draft.origin))


def _parent(stage: str, draft: Placed, earlier: dict[str, StageRecipe]) -> str | None:
    """The stage this one starts from: as told, else the last one before it that trains weights (for chat: that exports)."""
    kind = RECIPE_OF_MAIN[draft.value["main"].value]
    told = draft.value.get("from")
    if told is None:
        wanted = (ExportRecipe,) if issubclass(kind, ChatRecipe) else (ModelStageRecipe,)
        found = [name for name, recipe in earlier.items() if isinstance(recipe, wanted)]
        return found[-1] if found and not issubclass(kind, (TokenizerRecipe, PreparingRecipe)) else None
    if told.value not in earlier:
        raise RecipeError(told.origin, f"from: {told.value}", f"a stage above {stage}", nearest(str(told.value), earlier))
    return told.value


def _tokens_up_to(parent: str | None, stages: dict[str, StageRecipe]) -> int:
    """Tokens of the stages on the run's clock from the first ancestor to ``parent``, itself included."""
    total = 0
    while parent is not None:
        recipe = stages[parent]
        if isinstance(recipe, TrainRecipe) and recipe.schedule.clock == "run":
            total += recipe.tokens
        parent = recipe.parent
    return total


def _with_mixture(draft: Placed, configs: Path) -> Placed:
    """The contents of the mixture file as ``data.sources``, under what the run file says of them."""
    if "data" not in draft.value or "mixture" not in draft.value["data"].value:
        return draft
    mixture = draft.value["data"].value["mixture"]
    sources = read_mixture(str(mixture.value), configs, asked_at=mixture.origin)
    return merge(Placed({"data": Placed({"sources": sources}, mixture.origin)}, mixture.origin), draft)


def _with_rollout_batch(draft: Placed, kind: type[StageRecipe]) -> Placed:
    """RL has no batch of its own: one step trains on the replies of one rollout."""
    if not issubclass(kind, RLRecipe):
        return draft
    value = draft.value
    rollout = value["rollout"].value if "rollout" in value else {}
    numbers = [rollout.get("prompts_per_step"), rollout.get("group_size"), value.get("sequence_length")]
    given = value["batch"].value if "batch" in value else {}
    if "tokens" in given or not all(number and isinstance(number.value, int) for number in numbers):
        return draft
    prompts, group, length = (number.value for number in numbers)
    tokens = Placed(prompts * group * length, rollout["prompts_per_step"].origin)
    return merge(draft, Placed({"batch": Placed({"tokens": tokens}, tokens.origin)}, draft.origin))


def _tokenizer_size(stages: dict[str, StageRecipe]) -> int | None:
    sizes = [recipe.tokenizer.vocab_size for recipe in stages.values() if isinstance(recipe, TokenizerRecipe)]
    return sizes[-1] if sizes else None
