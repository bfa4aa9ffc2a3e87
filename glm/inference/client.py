"""The engine over HTTP: token ids in, token ids and their log-probabilities out."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import aiohttp

from glm.errors import EngineError


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. No top-k and no top-p: the log-probabilities are those of the whole distribution."""

    temperature: float
    """0 is greedy."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """One sampled continuation."""

    token_ids: list[int]
    """The stop token, where one ended the reply, included."""
    logprobs: list[float]
    """Of every token, under the distribution it was drawn from (after the temperature; at temperature 0: of 1)."""
    finish_reason: str
    """stop, length or abort."""
    weight_version: str
    """Of the weights that finished the reply."""
    verify_rounds: int | None
    """Forwards of the target model that verified drafts; None without speculation."""


class EngineClient:
    """One server. Use inside ``async with``; connections are kept. Raises EngineError, with the server's own words."""

    def __init__(self, url: str, api_key: str, *, request_timeout_seconds: float = 300, connection_retries: int = 3):
        self.url, self._key = url, api_key
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_seconds)
        self._retries = connection_retries
        self._session: aiohttp.ClientSession | None = None
        self.retried = 0
        """Requests sent again because the connection failed or broke off. Anything else that fails is raised."""

    async def __aenter__(self) -> "EngineClient":
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"}, timeout=self._timeout,
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Reply:
        """One reply to one prompt."""
        return _reply(await self._post("/generate", _request(list(prompt_ids), sampling)))

    async def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """One reply to each prompt, in one request; returns when the last is done."""
        answer = await self._post("/generate", _request([list(ids) for ids in prompts], sampling))
        return [_reply(each) for each in answer]

    async def chat(self, messages: list[dict], *, thinking: bool, max_new_tokens: int, temperature: float) -> tuple[str, str]:
        """(reasoning, answer) of the next turn, through the served model's chat template."""
        answer = await self._post("/v1/chat/completions", {
            "model": "default", "messages": messages, "max_tokens": max_new_tokens, "temperature": temperature,
            "chat_template_kwargs": {"enable_thinking": thinking},
        })
        message = answer["choices"][0]["message"]
        return message.get("reasoning_content") or "", message.get("content") or ""

    async def update_weights(self, folder: Path, version: str) -> None:
        """Loads target and draft from a Hugging Face folder the server can read, best in memory (/dev/shm).

        Requests in flight are held, lose their keys/values, and go on under the new weights.
        """
        await self._post("/pause_generation", {"mode": "retract"})
        try:
            answer = await self._post("/update_weights_from_disk", {
                "model_path": str(folder), "weight_version": str(version), "flush_cache": True,
            })
        finally:
            await self._post("/continue_generation", {})
        if not answer.get("success"):
            raise EngineError(f"weight update of {self.url} from {folder}", answer.get("message", str(answer)),
                              "all weights loaded", "see the server's log")

    async def weight_digests(self) -> dict[str, dict[str, str]]:
        """{"target": {tensor: digest}, "draft": {...}} of every tensor as the engine holds it; see engine_layout.py."""
        answer = await self._post("/weights_checker", {"action": "checksum"})
        ranks = answer["ranks"]
        if len(ranks) != 1:
            raise EngineError(f"weight digests of {self.url}", f"{len(ranks)} tensor-parallel ranks", "one",
                              "digests are compared for tp: 1 only")
        digests: dict[str, dict[str, str]] = {"target": {}, "draft": {}}
        for name, digest in ranks[0]["checksums"].items():
            role, _, rest = name.partition(".")
            digests["draft" if role == "draft" else "target"][rest if role == "draft" else name] = digest
        return digests

    async def flush_cache(self, timeout_seconds: float = 10) -> None:
        """Forgets all keys/values. The server refuses for a moment after a reply; asked again until the time is up."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while True:
            status, body = await self._send("POST", "/flush_cache", {})
            if status == 200:
                return
            if status != 400 or asyncio.get_running_loop().time() > deadline:
                self._fail("/flush_cache", status, body)
            await asyncio.sleep(0.05)

    async def health(self) -> bool:
        """Whether the server answers and takes requests."""
        try:
            return (await self._send("GET", "/health", None))[0] == 200
        except EngineError:
            return False

    async def _post(self, path: str, body: dict):
        status, answer = await self._send("POST", path, body)
        if status != 200:
            self._fail(path, status, answer)
        return answer

    async def _send(self, method: str, path: str, body: dict | None):
        """(status, decoded JSON or text)."""
        assert self._session is not None, "use the client inside 'async with'"
        for attempt in range(self._retries + 1):
            try:
                async with self._session.request(method, self.url + path, json=body) as response:
                    json_body = response.content_type == "application/json"
                    return response.status, await (response.json() if json_body else response.text())
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as problem:
                if attempt == self._retries:
                    raise EngineError(f"inference server {self.url}{path}",
                                      f"no whole answer in {attempt + 1} attempts ({problem})", "a running server",
                                      "see whether the server is alive and read its log") from None
                self.retried += 1
                await asyncio.sleep(0.2 * 2**attempt)
            except asyncio.TimeoutError:
                raise EngineError(f"inference server {self.url}{path}", f"no answer within {self._timeout.total:.0f} s",
                                  "an answer", "raise engine.request_timeout_seconds, or send fewer tokens a request") from None
            except (aiohttp.ClientError, ValueError) as problem:  # not HTTP, not JSON, or not text
                raise EngineError(f"inference server {self.url}{path}", f"an unusable answer: {problem!r}", "JSON or text",
                                  "see whether the port is that of the server, and read its log") from None

    def _fail(self, path: str, status: int, body):
        raise EngineError(f"inference server {self.url}{path}", f"status {status}: {str(body)[:2000]}", "status 200",
                          "the server's own words are above; its log says more")


def _request(input_ids: list, sampling: Sampling) -> dict:
    return {
        "input_ids": input_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "skip_special_tokens": False,
        },
        "return_logprob": True,
    }


def _reply(answer: dict) -> Reply:
    meta = answer["meta_info"]
    drawn = meta["output_token_logprobs"]
    return Reply(
        token_ids=[entry[1] for entry in drawn],
        logprobs=[entry[0] for entry in drawn],
        finish_reason=meta["finish_reason"]["type"],
        weight_version=str(meta["weight_version"]),
        verify_rounds=meta.get("spec_verify_ct"),
    )
