"""Combinations that cannot run, and what this release does not do yet: both found before anything starts."""

from glm.errors import PlatformError, RecipeError
from glm.recipe.schema import ModelStageRecipe, RLRecipe, StageRecipe, TokenizerRecipe


def check_stage(recipe: StageRecipe, places: dict[str, str], tokenizer_size: int | None = None) -> None:
    """Raises RecipeError, with the numbers, at the place that set the first of them. ``places``: dotted key -> file:line."""

    def require(holds: bool, key: str, found: str, expected: str, todo: str) -> None:
        if not holds:
            raise RecipeError(_place_of(key, places, recipe.stage), f"stage {recipe.stage}: {found}", expected, todo)

    if isinstance(recipe, TokenizerRecipe) or tokenizer_size:
        size = recipe.tokenizer.vocab_size if isinstance(recipe, TokenizerRecipe) else tokenizer_size
        require(
            size <= recipe.model.vocab_size, "tokenizer.vocab_size", f"a tokenizer of {size} entries, an embedding of {recipe.model.vocab_size}",
            "no more entries than the embedding has rows", "lower tokenizer.vocab_size or raise model.vocab_size",
        )
    _check_layout(recipe, require)
    if isinstance(recipe, ModelStageRecipe):
        _check_lengths(recipe, require)


def refuse_unproved(recipe: StageRecipe) -> None:
    """What a recipe may say and this release does not do is refused when it is to run, not ignored.

    Only stages that train weights divide a model; others are one process, whatever their layout says.
    Raises PlatformError for a layout or kernel that is not wired in, RecipeError for a way of RL that is not.
    """
    if not isinstance(recipe, ModelStageRecipe):
        return
    _refuse_kernels(recipe)
    if not isinstance(recipe, RLRecipe):
        return
    for key, found, allowed in (
        ("rollout.max_staleness", recipe.rollout.max_staleness, 0), ("engine.tp", recipe.engine.tp, 1),
        ("schedule.clock", recipe.schedule.clock, "stage"),
    ):
        if found != allowed:
            raise RecipeError(
                f"{recipe.stage}: {key}", str(found), f"{allowed}; this release does no other (README.md, Not yet)",
                f"set {recipe.stage}.{key}={allowed}",
            )


def _refuse_kernels(recipe: ModelStageRecipe) -> None:
    kernels, stage = recipe.kernels, recipe.stage
    if kernels.experts == "te":
        raise PlatformError(
            f"{stage}: kernels.experts", "te: transformer-engine's grouped layers keep one parameter an expert",
            "grouped_mm or host, whose experts are one stacked tensor: optimizer, checkpoints and converters know these names",
            "set kernels.experts=grouped_mm in the hardware file; kernels.attention=te works beside it",
        )
    if recipe.platform == "host" and kernels.attention == "te":
        raise PlatformError(
            f"{stage}: kernels.attention", "te with platform: host", "sdpa: transformer-engine runs on GPUs only",
            "set kernels.attention=sdpa in the hardware file",
        )
    if recipe.platform == "cuda" and kernels.experts == "host":
        raise PlatformError(
            f"{stage}: kernels.experts", "host with platform: cuda", "grouped_mm: host asks the GPU for the tokens of every expert, "
            "and the GPU waits", "set kernels.experts=grouped_mm in the hardware file",
        )
    packs = isinstance(recipe, RLRecipe) or recipe.data.packing == "best_fit"
    if kernels.attention == "te" and recipe.layout.cp > 1 and packs:
        raise PlatformError(
            f"{stage}: kernels.attention", f"te with packed documents and layout.cp {recipe.layout.cp}",
            "sdpa, or cp 1, or rows of one document: transformer-engine cuts every document of a pack among the ranks, this suite the row",
            "set kernels.attention=sdpa for this stage",
        )


def data_parallel_size(recipe: StageRecipe) -> int:
    """Ranks that read different sequences."""
    layout = recipe.layout
    return recipe.world_size // (layout.tp * layout.pp * layout.cp)


def _check_layout(recipe: StageRecipe, require) -> None:
    layout, model, world = recipe.layout, recipe.model, recipe.world_size
    slots = layout.tp * layout.pp * layout.cp
    require(
        world % slots == 0, "layout", f"{world} ranks for tp {layout.tp} x pp {layout.pp} x cp {layout.cp} = {slots}",
        f"a multiple of {slots} ranks", "change the layout, or nodes and ranks_per_node",
    )
    for what, number, key in (
        ("num_attention_heads", model.num_attention_heads, "tp"), ("num_query_groups", model.num_query_groups, "tp"),
        ("hidden_size", model.hidden_size, "tp"), ("dense_ffn_size", model.dense_ffn_size, "tp"),
        ("width of the shared experts", model.num_shared_experts * model.expert_ffn_size, "tp"),
        ("num_experts", model.num_experts, "ep"), ("expert_ffn_size", model.expert_ffn_size, "etp"),
    ):
        parts = getattr(layout, key)
        require(number % parts == 0, f"layout.{key}", f"{what} {number} over {key} {parts}", f"a divisor of {number}", f"change layout.{key}")
    _check_pipeline(recipe, require)
    shared = world // layout.pp
    require(
        shared % (layout.ep * layout.etp) == 0, "layout.ep",
        f"ep {layout.ep} x etp {layout.etp} on the {shared} ranks (tp x cp x dp) of a pipeline stage", f"a divisor of {shared}",
        "change layout.ep, or the number of ranks",
    )


def _check_pipeline(recipe: StageRecipe, require) -> None:
    layout, layers = recipe.layout, recipe.model.num_layers
    chunks = layout.pp * layout.vpp
    require(layout.vpp == 1 or layout.pp > 1, "layout.vpp", f"vpp {layout.vpp} with pp 1", "vpp 1, or a pipeline", "raise layout.pp")
    require(
        chunks <= layers, "layout.pp", f"{layers} layers over pp {layout.pp} x vpp {layout.vpp} = {chunks} chunks", "a layer for each chunk",
        "lower layout.pp or layout.vpp",
    )
    given = layout.pipeline_layers
    require(
        given is None or len(given) == chunks and min(given) > 0 and sum(given) == layers, "layout.pipeline_layers",
        f"pipeline_layers {list(given or ())}", f"{chunks} numbers above 0 (pp {layout.pp} x vpp {layout.vpp}) that sum to {layers}",
        "correct the list, or leave it out",
    )


def _check_lengths(recipe: ModelStageRecipe, require) -> None:
    length, layout = recipe.sequence_length, recipe.layout
    require(length > 0, "sequence_length", f"sequence_length {length}", "a positive length", "raise sequence_length")
    require(
        length <= recipe.model.max_position, "sequence_length", f"sequence_length {length}", f"at most model.max_position {recipe.model.max_position}",
        "shorten the sequences, or raise max_position in the model file",
    )
    pieces = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    require(
        length % pieces == 0, "sequence_length", f"sequence_length {length} cut for tp {layout.tp} and cp {layout.cp}", f"a multiple of {pieces}",
        "change sequence_length or the layout",
    )
    replicas = data_parallel_size(recipe)
    if isinstance(recipe, RLRecipe):
        replies = recipe.rollout.prompts_per_step * recipe.rollout.group_size
        require(
            recipe.batch.tokens == replies * length, "batch.tokens", f"batch.tokens {recipe.batch.tokens} for {replies} replies of {length}",
            f"{replies * length}, what one rollout gives", "leave batch.tokens out",
        )
        require(
            recipe.rollout.max_new_tokens < length, "rollout.max_new_tokens", f"replies of {recipe.rollout.max_new_tokens} tokens",
            f"fewer than sequence_length {length}: the prompt needs room", "change one of the two",
        )
        require(replies >= replicas, "rollout", f"{replies} replies a step for {replicas} data-parallel ranks", "at least one each", "ask for more replies")
        return
    unit = replicas * recipe.batch.micro_batch_size * layout.pp if layout.vpp > 1 else replicas    # interleaving takes pp micro-batches in turn
    end = recipe.run_tokens_before + getattr(recipe, "tokens", 0)
    smallest = int(min(recipe.batch.tokens_at(recipe.run_tokens_before), recipe.batch.tokens_at(end)))    # a ramp is monotonic
    require(
        smallest >= unit * length, "batch.tokens", f"a batch of {smallest} tokens for {replicas} data-parallel ranks x {length} tokens",
        f"at least {unit * length}: one sequence a rank, {layout.pp} micro-batches a rank if stages are interleaved",
        "raise batch.tokens, shorten sequence_length, or use fewer data-parallel ranks",
    )


def _place_of(key: str, places: dict[str, str], stage: str) -> str:
    """Where ``key`` (or something in it, or the section around it) was set; the stage if it was nowhere."""
    inside = [place for name, place in places.items() if name == key or name.startswith(key + ".")]
    around = [place for name, place in places.items() if name.startswith(key.partition(".")[0] + ".")]
    return (inside + around + [f"stage {stage}"])[0]
