"""A server of a model with LLaMA-3.1-8B's exact architecture and seeded random weights, behind HTTP; what bench.gpu starts cold.

    llama_server.py --write DIR [--size 8b|tiny]     write the weights once: safetensors of 32 tensors each, bf16
    llama_server.py DIR [--compile] [--port P]       load them and serve

    /generate/N   N greedy tokens after a fixed prompt: {"tokens": [..], "boot", "count"}
    /count        as /generate/1, for clients that only want to see an answer

The first request does the first work on the model: with --compile it also compiles. `boot` is drawn once a process. Needs torch,
transformers and safetensors, nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

# https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# The same shape in small, for trying the whole way without a GPU.
_TINY = {
    **_8B,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {"8b": _8B, "tiny": _TINY}
PROMPT_TOKENS = 64
MOST_TOKENS = 32
_TENSORS_A_FILE = 32


def configuration(values: dict[str, Any]) -> Any:
    """The model's configuration; transformers 5 wants the rotary embedding's parameters in one place."""
    from transformers import LlamaConfig

    rope = {"rope_theta": values["rope_theta"], **values["rope_scaling"]}
    try:
        config = LlamaConfig(**{k: v for k, v in values.items() if k not in {"rope_theta", "rope_scaling"}}, rope_parameters=rope)
        if getattr(config, "rope_parameters", None) == rope:
            return config
    except TypeError:
        pass
    return LlamaConfig(**values)


def _empty_model(values: dict[str, Any]) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(configuration(values)).to(torch.bfloat16)


def write(folder: Path, size: str) -> None:
    """The weights, normal with a deviation of 0.02 as LLaMA's are initialised, norms of one, and the configuration."""
    import torch

    save_file = import_module("safetensors.torch").save_file

    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(20)
    batch: dict[str, Any] = {}
    number = 0
    named = list(_empty_model(SIZES[size]).named_parameters())
    for index, (name, parameter) in enumerate(named, 1):
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        batch[name] = (tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02, generator=generator)).cpu()
        if len(batch) == _TENSORS_A_FILE or index == len(named):
            save_file(batch, folder / f"model-{number:03d}.safetensors")
            number, batch = number + 1, {}
    (folder / "size").write_text(size)


def load(folder: Path, device: str) -> Any:
    """The model on `device`, straight from the files."""
    import torch

    load_file = import_module("safetensors.torch").load_file
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = SIZES[(folder / "size").read_text()]
    model = _empty_model(values)
    for file in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(file, device=device), strict=False, assign=True)
    # Its tables are no weights: they stand in no file, and were made on the meta device.
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config=model.config)
    # What the copies went through: page-locked memory, a GiB of it, which torch would keep for the next copies.
    if device != "cpu":
        torch._C._host_emptyCache()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.device.type == "meta"]
    if left:
        raise SystemExit(f"llama_server: no weights in {folder} for {left[:3]}")
    return model.eval()


class Generator:
    """Greedy tokens; prefill and steps on a static cache, so that torch.compile sees the same shapes each time."""

    def __init__(self, model: Any, device: str, compiled: bool) -> None:
        import torch

        self._torch, self.model, self.device = torch, model, device
        self.forward = model.forward
        draw = torch.Generator().manual_seed(5)
        self.prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT_TOKENS), generator=draw).to(device)
        if compiled:
            # Once as it is, so that the cache's tensors are made outside of the graphs; those are CUDA graphs on a GPU.
            self.tokens(1)
            self.forward = torch.compile(model.forward, mode="reduce-overhead" if device == "cuda" else "default", dynamic=False)

    def tokens(self, count: int) -> list[int]:
        """The first `count` tokens after the prompt."""
        with self._torch.inference_mode():
            return list(self._tokens(count))

    def _tokens(self, count: int) -> Iterator[int]:
        torch = self._torch
        cache = self._cache()
        ids, position = self.prompt, torch.arange(PROMPT_TOKENS, device=self.device)
        for _ in range(count):
            out = self.forward(
                input_ids=ids,
                position_ids=position[None],
                cache_position=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = out.logits[:, -1:].argmax(-1).clone()
            position = position[-1:] + 1
            yield int(ids)

    def _cache(self) -> Any:
        from transformers import StaticCache

        if not hasattr(self, "_static"):
            self._static = StaticCache(config=self.model.config, max_cache_len=PROMPT_TOKENS + MOST_TOKENS)
        self._static.reset()
        return self._static


def serve(generator: Generator, port: int, boot: str) -> None:
    """Answer for ever, one request after the other, from the main thread: CUDA graphs of torch.compile belong to a thread."""
    count = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal count
            wanted = self.path.rpartition("/")[2]
            begin = time.perf_counter()
            tokens = generator.tokens(min(int(wanted), MOST_TOKENS) if wanted.isdigit() else 1)
            count += 1
            answer = {"tokens": tokens, "boot": boot, "count": count, "took_s": round(time.perf_counter() - begin, 4)}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Backlog(HTTPServer):
        request_queue_size = 128

    Backlog(("0.0.0.0", port), Handler).serve_forever()


def main() -> None:
    """Write or serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--size", choices=sorted(SIZES), default="8b")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.write:
        write(options.folder, options.size)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # the first process of a container has no default handlers
    boot = secrets.token_hex(8)
    generator = Generator(load(options.folder, options.device), options.device, options.compile)
    print("serving", flush=True)
    serve(generator, options.port, boot)


if __name__ == "__main__":
    main()
