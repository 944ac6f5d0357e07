"""What runs in a peer's own interpreter, as a script: `python worker.py PEER`, JSON lines in and out.

Nothing of memory3 is imported, for the venv of a peer has none of it. The first line in says what to load and is answered by the version
of the peer; each further line is one thing to do:

* `{"do": "encode", "prefix": ids, ...}`: what stands before every prompt from now on, once. Answer: `seconds`, and `bytes` that are kept.
* `{"do": "answer", "prompt": ids, "output": n}`: exactly `n` tokens behind prefix and prompt, greedily. Answer: `ids`, the seconds to the first
  of them, and the seconds of the others.

An error is answered by `{"error": sentence}`, and the script ends.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from inspect import signature
from time import perf_counter
from typing import Any

Answer = tuple[list[int], float, float]
"""Token ids, seconds to the first of them, seconds of the others."""

GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
"""Dtypes of key-values by the numbers of ggml: those of the model, where llama.cpp's own default is float16."""


class Transformers:
    """The references as text in the prompt, and plain `generate`: nothing is kept between two prompts."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.model, self.version = _loaded(setup)
        self.prefix: list[int] = []

    def encode(self, prefix: list[int], options: dict[str, Any]) -> int | None:
        """Nothing is done ahead."""
        self.prefix = prefix
        return None

    def answer(self, prompt: list[int], output: int) -> Answer:
        """The stopping criterion that never stops is where the clock is read: it is asked behind every token."""
        import torch

        seen: list[float] = []

        def noted(ids: Any, scores: Any, **_: Any) -> Any:
            seen.append(perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        ids = torch.tensor([self.prefix + prompt], device=self.model.device)
        began = perf_counter()
        with torch.no_grad():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=output,
                eos_token_id=None,
                stopping_criteria=[noted],
            )
        return made[0, ids.shape[1] :].tolist(), seen[0] - began, seen[-1] - seen[0]


class KvPress:
    """The prefix is encoded once and pressed to `kept` key-values of each head; the loop is that of kvpress's own pipeline."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import kvpress

        self.presses = kvpress
        self.model, under = _loaded(setup)
        self.version = f"kvpress {version('kvpress')}, {under}"
        self.keyword = "cache" if "cache" in signature(self.model.forward).parameters else "past_key_values"
        self.encode([], {})

    def encode(self, prefix: list[int], options: dict[str, Any]) -> int | None:
        """Options: `press`, a class of kvpress or none, and `kept`. Bytes of all layers."""
        from contextlib import nullcontext

        import torch
        from transformers import DynamicCache

        self.cache, self.length = DynamicCache(), len(prefix)
        if not prefix:
            return None
        dropped = 1 - (options["kept"] + 0.5) / len(prefix) if options["press"] else 0.0  # kvpress rounds what it keeps down
        press = getattr(self.presses, options["press"])(dropped) if options["press"] else None
        with torch.no_grad(), press(self.model) if press else nullcontext():
            self.model.model(torch.tensor([prefix], device=self.model.device), **{self.keyword: self.cache})
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(int(tensor.nbytes) for tensor in tensors)

    def answer(self, prompt: list[int], output: int) -> Answer:
        """Positions go on behind the whole prefix; what the answer added to the cache is taken away again."""
        import torch

        began = perf_counter()
        kept = self.cache.get_seq_length()
        with torch.no_grad():
            found = [self._next(prompt, self.length)]
            first = perf_counter()
            for n in range(output - 1):
                found.append(self._next(found[-1:], self.length + len(prompt) + n))
        ended = perf_counter()
        self.cache = self.cache if kept else type(self.cache)()
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        return found, first - began, ended - first

    def _next(self, ids: list[int], position: int) -> int:
        import torch

        positions = torch.arange(position, position + len(ids), device=self.model.device)[None]
        given = torch.tensor([ids], device=self.model.device)
        out = self.model(given, **{self.keyword: self.cache}, position_ids=positions, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp, which keeps the key-values of the last prompt and encodes only what differs: the prefix once."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import llama_cpp

        self.library, self.version = llama_cpp, f"llama-cpp-python {llama_cpp.__version__}"
        if setup["device"] != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise ValueError(
                f"found a build for the CPU alone, expected one for {setup['device']}: build it so, or give --device cpu"
            )
        kind = GGML_TYPES[setup["dtype"]]
        threads = {"n_threads": setup["threads"], "n_threads_batch": setup["threads"]}
        self.model = llama_cpp.Llama(
            setup["gguf"],
            n_ctx=setup["length"],
            n_gpu_layers=0 if setup["device"] == "cpu" else -1,
            type_k=kind,
            type_v=kind,
            verbose=False,
            **threads,
        )
        self.prefix: list[int] = []

    def encode(self, prefix: list[int], options: dict[str, Any]) -> int | None:
        """Forget everything, then encode the prefix. Bytes: those of the sequence's state, as it would be saved."""
        self.prefix = prefix
        self.library.llama_memory_clear(self.library.llama_get_memory(self.model.ctx), True)
        self.model.reset()
        if not prefix:
            return None
        self.model.eval(prefix)
        return int(self.library.llama_state_seq_get_size(self.model.ctx, 0))

    def answer(self, prompt: list[int], output: int) -> Answer:
        """`Llama.generate` finds by itself how much of the prompt it has."""
        began = perf_counter()
        made = self.model.generate(self.prefix + prompt, temp=0.0, repeat_penalty=1.0)
        found = [next(made)]
        first = perf_counter()
        found += [next(made) for _ in range(output - 1)]
        ended = perf_counter()
        made.close()
        return [int(id) for id in found], first - began, ended - first


PEERS = {"transformers": Transformers, "llama.cpp": LlamaCpp, "kvpress": KvPress}


def _loaded(setup: dict[str, Any]) -> tuple[Any, str]:
    """The model in a folder, and the version of transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(setup["threads"])
    kind = getattr(torch, setup["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(setup["model"], dtype=kind, use_safetensors=True)
    return model.to(setup["device"]).eval(), f"transformers {transformers.__version__}"


def done(peer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to one line."""
    if asked["do"] == "encode":
        began = perf_counter()
        kept = peer.encode(asked["prefix"], asked)
        return {"seconds": perf_counter() - began, "bytes": kept}
    ids, first_s, others_s = peer.answer(asked["prompt"], asked["output"])
    return {"ids": ids, "first_s": first_s, "others_s": others_s}


def main(name: str) -> None:
    """Answer line by line. What libraries print goes to stderr: stdout is the protocol's alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        peer: Any = None
        for line in sys.stdin:
            if peer is None:
                peer = PEERS[name](json.loads(line))
                say({"version": peer.version})
            else:
                say(done(peer, json.loads(line)))
    except Exception as error:  # whatever went wrong in a library is the reason that the reader is told
        say({"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"})
        raise


if __name__ == "__main__":
    main(sys.argv[1])
