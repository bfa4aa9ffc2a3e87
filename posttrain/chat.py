"""Stage: a few dialogues with the exported model, through SGLang, as a user would have them."""

import asyncio
import json

from glm.checkpoint.run_folder import RunFolder, write_atomically
from glm.inference.chat import Dialogue, find_model, sample_dialogues, stored_dtype
from glm.inference.client import EngineClient
from glm.inference.server import EngineServer, ServerSpec
from glm.recipe.schema import ChatRecipe


def main(recipe: ChatRecipe) -> None:
    """Asks each of ``prompts`` with and without thinking; prints the dialogues and leaves them for the report."""
    folder = RunFolder.of(recipe)
    model_folder, _ = find_model(folder.root)
    spec = ServerSpec(
        model_folder, recipe.platform, num_draft_steps=recipe.engine.speculative.num_steps, tp=recipe.engine.tp,
        context_length=recipe.engine.context_length, memory_fraction=recipe.engine.memory_fraction, seed=recipe.seed,
        max_running_requests=min(recipe.engine.max_running_requests, 2 * len(recipe.prompts)),
        dtype=stored_dtype(model_folder), extra=recipe.sglang,
    )
    with EngineServer(spec, folder.stage(recipe.stage) / "engine.log") as server:
        server.wait_ready(recipe.engine.start_timeout_seconds)
        dialogues = asyncio.run(_ask(server, recipe))
    write_atomically(folder.samples(recipe.stage), "".join(
        json.dumps({"step": 0, "prompt": one.prompt, "reply": one.reply, "reward": None, "task": None}, ensure_ascii=False) + "\n"
        for one in dialogues
    ))
    for one in dialogues:
        print(f"\nyou  {one.prompt}{'' if one.thinking else '  (no thinking)'}\nglm  {one.reply.strip()}", flush=True)


async def _ask(server: EngineServer, recipe: ChatRecipe) -> list[Dialogue]:
    async with EngineClient(
        server.url, server.spec.api_key, request_timeout_seconds=recipe.engine.request_timeout_seconds,
    ) as client:
        return [
            dialogue
            for thinking in (True, False)
            for dialogue in await sample_dialogues(client, recipe.prompts, thinking=thinking, max_new_tokens=recipe.max_new_tokens)
        ]
