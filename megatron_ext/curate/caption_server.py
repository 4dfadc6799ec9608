"""Asking a model behind OpenAI's chat protocol (vLLM in production), and asking again when the server misbehaves.

Only this module imports `openai`.
"""

import asyncio
import os
import random
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import openai

from megatron_ext.config import InputError, reason_of
from megatron_ext.config.section import Count, Name, NonNegative, Positive, Section

LARGEST_WAIT_S = 60.0
"""Seconds: what a server asks for beyond this (Retry-After) is not waited for, and waits grow no further."""

SILENT_AFTER = 8
"""Questions in a row that were given up, at least, before the server counts as gone: one may have crashed it."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Section, section="server"):
    """Where and how to ask."""

    base_url: str
    """Address of the server up to /v1: http://node:8000/v1."""

    model: Name
    """Name of the model there; `curl BASE_URL/models` lists them."""

    api_key_env: Name = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset sends a placeholder, which vLLM takes."""

    concurrency: Count = 32
    """Questions in flight at once; a server that batches needs many."""

    timeout_s: Positive = 120.0
    """Seconds for one whole answer, however slowly it drips."""

    attempts: Count = 6
    """How often a question is asked when the server fails, is busy or silent."""

    backoff_s: NonNegative = 1.0
    """Seconds before the second attempt; twice as long before each further one, up to 60, with jitter."""

    max_tokens: Count = 512
    """Tokens of an answer at most; one that is cut there is unusable."""

    temperature: NonNegative = 0.0
    """Of sampling; 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"server.base_url {self.base_url!r}: give http://HOST:PORT/v1")


class Unanswered(Exception):
    """A question has no usable answer; the message says why."""


class CaptionServer:
    """The server, for use inside one event loop. An asynchronous context manager."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        key = os.environ.get(config.api_key_env) or "none"
        # Attempts are counted and timed here: the client's own would hide them.
        self._client = openai.AsyncOpenAI(base_url=config.base_url, api_key=key, max_retries=0, timeout=None)
        self._given_up = 0
        self.retries: Counter[str] = Counter()
        """Fault -> how often a question was asked again for it."""
        self.tokens: Counter[str] = Counter()
        """`prompt` and `completion`: tokens that the server counted."""

    async def __aenter__(self) -> "CaptionServer":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.close()

    async def ask(self, content: list[dict[str, Any]]) -> str:
        """The model's answer.

        Raises:
            Unanswered: it cannot be used, the server refuses the question, or it failed at every attempt.
            InputError: the server refuses key, model or address, or has failed for many questions in a row.
        """
        for attempt in range(1, self._config.attempts + 1):
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    answer = await self._client.chat.completions.create(
                        model=self._config.model,
                        messages=[{"role": "user", "content": content}],
                        max_tokens=self._config.max_tokens,
                        temperature=self._config.temperature,
                    )
                text = self._usable(answer)
            except (openai.APIError, TimeoutError, ValueError) as error:
                fault = self._passing_fault(error)
                if attempt == self._config.attempts:
                    raise self._give_up(fault) from None
                self.retries[fault] += 1
                await asyncio.sleep(self._wait(attempt, error))
            else:
                self._given_up = 0
                return text
        raise AssertionError("attempts is positive")

    def _usable(self, answer: Any) -> str:
        """The text of an answer. ValueError for what is none of the protocol's, Unanswered for what cannot be used."""
        try:
            choice = answer.choices[0]
            text, reason, refusal = choice.message.content, choice.finish_reason, choice.message.refusal
        except (AttributeError, IndexError, TypeError):
            raise ValueError("not the protocol's JSON") from None
        if answer.usage:
            self.tokens["prompt"] += answer.usage.prompt_tokens
            self.tokens["completion"] += answer.usage.completion_tokens
        if refusal:
            raise Unanswered("the model refused")
        if reason in ("length", "content_filter"):
            raise Unanswered("cut at server.max_tokens" if reason == "length" else "the server's content filter cut it")
        if not isinstance(text, str) or not text.strip():
            raise Unanswered("an empty answer")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unanswered("not Unicode: a lone surrogate") from None
        return text.strip()

    def _passing_fault(self, error: Exception) -> str:
        """The name of a fault that may pass. One that does not is raised: Unanswered, or InputError if all meet it."""
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in (401, 403, 404):
                raise InputError(
                    f"server.base_url = {self._config.base_url}: HTTP {status} for model {self._config.model!r} "
                    f"({reason_of(error)}): correct server.base_url, server.model or the key in "
                    f"${self._config.api_key_env}"
                ) from None
            if status < 500 and status not in (408, 409, 425, 429):
                raise Unanswered(f"the server refuses it: HTTP {status} ({reason_of(error)})") from None
            return f"HTTP {status}"
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"no answer within {self._config.timeout_s:g} s"
        if isinstance(error, openai.APIConnectionError):
            return "no connection, or it was lost"
        return "not the protocol's JSON"

    def _give_up(self, fault: str) -> Exception:
        self._given_up += 1
        if self._given_up >= max(SILENT_AFTER, self._config.concurrency):
            return InputError(
                f"server.base_url = {self._config.base_url}: {self._given_up} questions in a row failed at "
                f"{self._config.attempts} attempts each (the last: {fault}): start the server again, then this "
                "program, which goes on where it stopped"
            )
        return Unanswered(f"{fault}, {self._config.attempts} times")

    def _wait(self, attempt: int, error: Exception) -> float:
        """Seconds until the next attempt, of which `attempt` were made: the server's Retry-After or more."""
        wait = self._config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1)
        if isinstance(error, openai.APIStatusError):
            try:
                wait = max(wait, float(error.response.headers.get("retry-after", 0)))
            except ValueError:  # a date, which no server of this protocol sends
                pass
        return min(wait, LARGEST_WAIT_S)
