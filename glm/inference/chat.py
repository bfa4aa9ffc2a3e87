"""Talking to an exported model: in the terminal, or a list of prompts in one go. Both through the served chat template."""

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from glm.checkpoint.run_folder import RunFolder
from glm.errors import CheckpointError, EngineError
from glm.inference.client import EngineClient
from glm.inference.server import EngineServer, ServerSpec

HELP = "/think turns thinking on or off   /new forgets the conversation   /quit, or end of input, leaves"


@dataclass(frozen=True)
class Dialogue:
    """One prompt and what the model wrote."""

    prompt: str
    reasoning: str
    answer: str
    thinking: bool

    @property
    def reply(self) -> str:
        """Reasoning and answer as the model wrote them, with the tag between."""
        return f"{self.reasoning}</think>{self.answer}" if self.reasoning else self.answer


def chat(folder: Path, *, platform: str | None = None, num_draft_steps: int = 0, max_new_tokens: int = 512,
         temperature: float = 0.7) -> int:
    """An interactive conversation with the model in ``folder``: a Hugging Face folder, or a run folder with an export.

    platform: host or cuda; None takes that of the run, and host for a bare model folder. Returns an exit status.
    """
    from rich.console import Console

    console = Console()
    model_folder, recorded = find_model(folder)
    with tempfile.TemporaryDirectory(prefix="glm-chat-") as scratch:
        spec = ServerSpec(model_folder, platform or recorded, num_draft_steps=num_draft_steps, max_running_requests=4,
                          dtype=stored_dtype(model_folder))
        with EngineServer(spec, Path(scratch) / "server.log") as server:
            with console.status(f"starting SGLang on {model_folder}"):
                server.wait_ready()
            console.print(HELP, style="dim")
            asyncio.run(_converse(server, console, max_new_tokens, temperature))
    return 0


async def _converse(server: EngineServer, console, max_new_tokens: int, temperature: float) -> None:
    messages: list[dict] = []
    thinking = True
    async with EngineClient(server.url, server.spec.api_key) as client:
        while True:
            try:
                text = console.input("[bold cyan]you  [/]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if text == "/quit":
                return
            if text == "/new":
                messages = []
            elif text == "/think":
                thinking = not thinking
                console.print(f"thinking is {'on' if thinking else 'off'}", style="dim")
            elif text.startswith("/") or not text:
                console.print(HELP, style="dim")
            else:
                messages.append({"role": "user", "content": text})
                try:
                    reasoning, answer = await client.chat(messages, thinking=thinking, max_new_tokens=max_new_tokens,
                                                          temperature=temperature)
                except EngineError as problem:  # most often a conversation longer than the model's context
                    console.print(str(problem), style="red", markup=False, highlight=False)
                    console.print("that turn is forgotten; /new forgets the whole conversation", style="dim")
                    messages.pop()
                    continue
                if reasoning:
                    console.print(reasoning.strip(), style="dim italic", markup=False)
                console.print("glm  ", style="bold green", end="")
                console.print(answer.strip() or "(no answer within the token limit)", markup=False, highlight=False)
                messages.append({"role": "assistant", "content": answer})


async def sample_dialogues(client: EngineClient, prompts: Sequence[str], *, thinking: bool = True, max_new_tokens: int = 48,
                           temperature: float = 0.0) -> list[Dialogue]:
    """The model's reply to each prompt, each a conversation of its own, in the order of the prompts."""
    replies = await asyncio.gather(*(
        client.chat([{"role": "user", "content": prompt}], thinking=thinking, max_new_tokens=max_new_tokens,
                    temperature=temperature)
        for prompt in prompts
    ))
    return [Dialogue(prompt, reasoning, answer, thinking) for prompt, (reasoning, answer) in zip(prompts, replies)]


def find_model(folder: Path) -> tuple[Path, str]:
    """The Hugging Face folder meant by ``folder`` and the platform its run was made on (host for a bare model folder).

    Raises CheckpointError when there is no model in it.
    """
    if (folder / "config.json").is_file():
        return folder, "host"
    run = RunFolder(folder)
    if not (run.export / "config.json").is_file():
        raise CheckpointError(f"folder {folder}", "neither config.json nor export/config.json in it",
                              "a Hugging Face model folder, or the folder of a run whose export stage is done",
                              "finish the run first: glm run RUNFILE")
    recipes = sorted((folder / "stages").glob("*/recipe.json"))
    return run.export, json.loads(recipes[-1].read_text())["platform"] if recipes else "host"


def stored_dtype(model_folder: Path) -> str:
    """The dtype config.json names, as SGLang spells it."""
    config = json.loads((model_folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
