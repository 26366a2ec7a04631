"""What the demo asks of its server over HTTP, and how the time to the first token is taken."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smr.proto.errors import Code, SmrError

_POLL_S = 0.005

# The first token is asked for with the same short prompt each time, and computed whole. The others are the reference:
# one goes through the prefix cache, which a restore must bring back, the other computes every token.
FIRST_PROMPT = tuple(range(100, 116))
CACHED_PROMPT = tuple(range(200, 248))
FRESH_PROMPT = tuple(range(1000, 1064))
REFERENCE_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of /generate."""

    tokens: tuple[int, ...]
    cached_tokens: int
    requests: int


class Client:
    """A server on `port` of this machine. Each request has a connection of its own, closed after it."""

    def __init__(self, port: int, timeout_s: float = 120.0) -> None:
        self.port = port
        self._timeout_s = timeout_s

    def generate(self, prompt: Sequence[int], max_tokens: int, *, cache: bool) -> Answer:
        """Greedy tokens. OSError when nobody answers; ENGINE_FAILED when the answer is no success."""
        document = self._ask("POST", "/generate", {"prompt_tokens": list(prompt), "max_tokens": max_tokens, "cache": cache})
        tokens = document["tokens"]
        assert isinstance(tokens, list)
        return Answer(
            tokens=tuple(tokens), cached_tokens=int(str(document["cached_tokens"])), requests=int(str(document["requests"]))
        )

    def health(self) -> Mapping[str, object]:
        """What the server says of itself."""
        return self._ask("GET", "/health", None)

    def first_token(self, alive: Callable[[], None], *, timeout_s: float) -> Answer:
        """Ask until the first token comes. `alive` raises when there is no use in asking on; TIMEOUT after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.generate(FIRST_PROMPT, 1, cache=False)
            except OSError:
                alive()
            if time.monotonic() > deadline:
                raise SmrError(
                    f"the demo's server gave no token within {timeout_s:g} s",
                    hint="try a smaller model: smr demo --params tiny",
                    code=Code.TIMEOUT,
                )
            time.sleep(_POLL_S)

    def reference(self) -> tuple[Answer, Answer]:
        """Answers that a restored server must give again: one with the prefix cache, one without."""
        return (
            self.generate(CACHED_PROMPT, REFERENCE_TOKENS, cache=True),
            self.generate(FRESH_PROMPT, REFERENCE_TOKENS, cache=False),
        )

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None) -> Mapping[str, object]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self._timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Connection": "close"})
            response = connection.getresponse()
            document = json.loads(response.read())
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        if response.status != 200:
            raise SmrError(f"the demo's server answered {response.status} to {path}: {document}", code=Code.ENGINE_FAILED)
        assert isinstance(document, dict)
        return document
