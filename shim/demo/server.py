"""A small but real inference server: a LLaMA-architecture model on transformers and torch (CPU) behind HTTP.

It is the load of `smr demo`, and runs inside the container with the machine's own interpreter; so it imports nothing of SMR.

    GET  /health     {"ready": true, "requests": N, "prefixes": N, "parameters": N, "dtype": .., "started": ..}
    POST /generate   {"prompt_tokens": [..], "max_tokens": N, "cache": true}
                     -> {"tokens": [..], "cached_tokens": N, "requests": N}

Decoding is greedy. State that lives in memory only, and so shows what a restore brings back: the counter of requests, and
the prefix cache, which keeps the keys and values of the last prompts (`cached_tokens` of an answer were not computed again).
The weights are read into memory that the process owns, in the type the CPU computes in, as servers do that pack or convert
them. The port opens after the warm-up: who gets an answer gets it from a warm server.

The model directory holds `config.json` and `model.safetensors`: seeded random weights, made once by `--make` and read ever after.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.cache_utils import DynamicCache

VOCABULARY = 32000
PREFIXES = 8
MAX_TOKENS = 512
MAX_BODY_BYTES = 1 << 20
WARM_UP_PROMPTS = (16, 32, 64, 128, 256, 512)
WARM_UP_TOKENS = 8

# name -> (hidden size, layers); heads are 64 wide, two query heads share one of keys and values
SIZES = {"tiny": (128, 2), "300m": (1344, 12), "400m": (1536, 12), "600m": (1792, 14)}


class Model(Protocol):
    """What the HTTP side needs of a model; tests bring their own."""

    def generate(self, prompt: Sequence[int], max_tokens: int, *, cache: bool) -> tuple[list[int], int]:
        """Greedy tokens after `prompt`, and how many of the prompt's tokens came from the prefix cache."""

    def facts(self) -> dict[str, object]:
        """What /health says of the model."""


class Llama:
    """The model with its prefix cache. One request computes at a time; the caller holds no lock."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._prefixes: OrderedDict[tuple[int, ...], DynamicCache] = OrderedDict()

    def generate(self, prompt: Sequence[int], max_tokens: int, *, cache: bool) -> tuple[list[int], int]:
        """See `Model.generate`."""
        import torch

        with self._lock, torch.inference_mode():
            state, cached = self._longest_prefix(prompt) if cache else (self._empty(), 0)
            tokens: list[int] = []
            ids = torch.tensor([list(prompt[cached:])])
            while len(tokens) < max_tokens:
                out = self._model(ids, past_key_values=state, use_cache=True, logits_to_keep=1)
                tokens.append(int(out.logits[0, -1].argmax()))
                ids = torch.tensor([[tokens[-1]]])
            if cache:
                self._keep(tuple(prompt), state)
            return tokens, cached

    def facts(self) -> dict[str, object]:
        """See `Model.facts`."""
        return {"parameters": self._model.num_parameters(), "dtype": str(self._model.dtype), "prefixes": len(self._prefixes)}

    def _empty(self) -> DynamicCache:
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self._model.config)

    def _longest_prefix(self, prompt: Sequence[int]) -> tuple[DynamicCache, int]:
        """A copy of the cached state that fits longest. The last token of a prompt is always computed: its logits are needed."""
        from copy import deepcopy

        shared = {key: min(common_prefix(key, prompt), len(prompt) - 1) for key in self._prefixes}
        best = max(shared, key=lambda key: shared[key], default=None)
        if best is None or shared[best] == 0:
            return self._empty(), 0
        self._prefixes.move_to_end(best)
        state = deepcopy(self._prefixes[best])
        crop(state, shared[best])
        return state, shared[best]

    def _keep(self, prompt: tuple[int, ...], state: DynamicCache) -> None:
        crop(state, len(prompt))
        self._prefixes[prompt] = state
        self._prefixes.move_to_end(prompt)
        while len(self._prefixes) > PREFIXES:
            self._prefixes.popitem(last=False)


def crop(state: DynamicCache, length: int) -> None:
    """Shorten `state` to its first `length` tokens. All versions of transformers take how many to drop as a negative number."""
    if surplus := state.get_seq_length() - length:
        state.crop(-surplus)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their start."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


class Server(ThreadingHTTPServer):
    """HTTP in front of a model, with the counter of requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], model: Model) -> None:
        super().__init__(address, Handler)
        self.model = model
        self.requests = 0
        self.started = time.time()
        self._lock = threading.Lock()

    def count(self) -> int:
        """One more request was answered; their number."""
        with self._lock:
            self.requests += 1
            return self.requests


class Handler(BaseHTTPRequestHandler):
    """One connection. A bad request is answered with 400 and {"error": ..}."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/health"""
        if self.path != "/health":
            return self._answer(404, {"error": f"no such path: {self.path}"})
        facts = {"ready": True, "requests": self.server.requests, "started": self.server.started, "pid": os.getpid()}
        return self._answer(200, facts | self.server.model.facts())

    def do_POST(self) -> None:
        """/generate"""
        if self.path != "/generate":
            return self._answer(404, {"error": f"no such path: {self.path}"})
        try:
            prompt, max_tokens, cache = parse_request(self._body())
        except ValueError as error:
            self.close_connection = True
            return self._answer(400, {"error": str(error)})
        tokens, cached = self.server.model.generate(prompt, max_tokens, cache=cache)
        requests = self.server.count()
        say(f"request {requests}: {len(prompt)} tokens in, {cached} of them cached, {len(tokens)} out")
        return self._answer(200, {"tokens": tokens, "cached_tokens": cached, "requests": requests})

    def log_message(self, *_: object) -> None:
        """Requests are printed where they are answered."""

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", "0"))
        if not 0 < length <= MAX_BODY_BYTES:
            raise ValueError(f"needed a body of 1 to {MAX_BODY_BYTES} bytes, Content-Length is {length}")
        return self.rfile.read(length)

    def _answer(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parse_request(body: bytes) -> tuple[list[int], int, bool]:
    """(prompt, max_tokens, cache) of a /generate request. ValueError says what is wrong with it."""
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError("needed a JSON object")
    prompt, max_tokens, cache = document.get("prompt_tokens"), document.get("max_tokens", 16), document.get("cache", True)
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int and 0 <= token < VOCABULARY for token in prompt):
        raise ValueError(f"prompt_tokens: needed a list of integers from 0 to {VOCABULARY - 1}")
    if type(max_tokens) is not int or not 1 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens: needed 1 to {MAX_TOKENS}")
    return prompt, max_tokens, bool(cache)


def say(text: str) -> None:
    """One line in the container's log."""
    print(text, flush=True)  # noqa: T201  # stdout is this program's log


def dtype_name() -> str:
    """bfloat16 where the CPU multiplies it, else float32: emulated bfloat16 is many times slower."""
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def make(directory: Path, params: str) -> None:
    """Write a model of size `params` with seeded random weights to `directory`; complete or absent, kept when there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if directory.exists():
        return
    hidden, layers = SIZES[params]
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    LlamaForCausalLM(config).to(getattr(torch, dtype_name())).save_pretrained(temporary)
    temporary.rename(directory)


def load(directory: Path) -> Llama:
    """The model of `directory` in memory that this process owns."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype_name()))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return Llama(model.eval())


def warm_up(model: Model) -> None:
    """Generate once for each usual prompt length: the first pass of a shape chooses kernels and allocates."""
    for length in WARM_UP_PROMPTS:
        model.generate(list(range(1, length + 1)), WARM_UP_TOKENS, cache=False)


def serve(directory: Path, host: str, port: int) -> None:
    """Load, warm up, then open the port and answer until SIGTERM."""
    begin = time.monotonic()
    model = load(directory)
    say(f"loaded {directory.name} ({model.facts()['dtype']}) after {time.monotonic() - begin:.1f} s")
    warm_up(model)
    server = Server((host, port), model)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    say(f"ready on port {port} after {time.monotonic() - begin:.1f} s")
    server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the server."""
    parser = argparse.ArgumentParser(description="inference server of 'smr demo'")
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104  # reached from outside its container
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--make", choices=SIZES, help="write a model of this size first; do not serve")
    options = parser.parse_args(arguments)
    # Threads that wait must not spin: on a busy machine they would take the very processor they wait for.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_WAIT_POLICY="passive")
    if options.make:
        make(options.model, options.make)
    else:
        serve(options.model, options.host, options.port)


if __name__ == "__main__":
    main()
