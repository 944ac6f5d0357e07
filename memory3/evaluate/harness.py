"""`--model memory3` for lm-evaluation-harness: any task of it, with memory and without, beside its own `--model hf`.

The harness looks models up in a registry that only its own package fills: 0.4.13 reads no entry points, and `--include_path` finds
tasks alone. Importing this module adds the row `memory3`; `run_harness`, `memory3 eval harness -- ARGS` and
`python -m memory3.evaluate.harness ARGS` import it and go on as the harness's own command line.

What is read when (design section 3): a prompt chunk reads what it recalled itself. The continuation that is scored is the
response: its first chunk reads what the last prompt chunk recalled, chunk g + 1 what chunk g recalled, so that no answer is ever
searched with before it is scored. A rolling likelihood has no prompt: chunk c reads what chunk c - 1 recalled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memory3.decoder import Decoder
from memory3.generation import Prompt, complete
from memory3.loading import load
from memory3.recall import EVALUATION_OVERLAP, Recall, Recaller
from memory3.remote import open_bank
from memory3.spec import Memory, Memory3Error


class HarnessError(Memory3Error):
    """The harness is missing, or asks for what this model type cannot do."""


try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string
    from tqdm import tqdm  # type: ignore[import-untyped]
except ImportError as error:
    raise HarnessError(
        f"found no lm-evaluation-harness of 0.4.13 or newer ({error}), expected it for its tasks: pip install 'memory3[harness]'"
    ) from None

NAME = "memory3"
AUTO_BATCH = 16
"""Sequences of a batch where the harness is told `auto`: no batch is tried out here."""
_DEFAULT_DEVICE = "cuda:0"
"""What the harness's command line says where no device was given; without a GPU its own `hf` takes the CPU then."""
ARGUMENTS = (
    "pretrained", "bank", "retriever", "references", "min_score", "overlap", "at", "no_memory", "device", "dtype",
    "batch_size", "max_batch_size", "max_length", "add_bos_token",
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """One sequence of a forward pass; the logits of its last `scored` tokens count.

    Chunk `c` reads what `queries[reads[c]]` brought, nothing where that is -1; a query without words brings what the one before
    it brought. `text` is what the overlap filter compares references with.
    """

    ids: tuple[int, ...]
    grid: tuple[int, ...]
    queries: tuple[str, ...]
    reads: tuple[int, ...]
    text: str
    scored: int


class Memory3LM(TemplateLM):  # type: ignore[misc]
    """A decoder that recalls, as the harness's `LM`.

    Texts are split into tokens as the harness's `hf` does it: spaces that end a context move to the continuation, and both are
    tokenised together. Without a recall every number is that of `hf` on the same folder.

    Args:
        decoder: an attached decoder.
        recall: where memories come from; `None` is closed book, in the plain model's layout.
        batch_size: sequences of a forward pass.
        max_length: most tokens of a sequence; by default what the model takes, less the references' interval where there is
            memory. Longer ones lose their beginning, as with `hf`.
        add_bos_token: whether a sequence starts with `<s>`. By default it does with memory, as memories were made for that
            layout, and without memory where the tokenizer itself puts one, as with `hf`.
    """

    def __init__(
        self,
        decoder: Decoder,
        recall: Recaller | None = None,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        if recall is not None:
            recall.check(decoder)
        self.decoder, self.recall, self.batch_size = decoder, recall, batch_size
        self.tokenizer, self._device = decoder.tokenizer, decoder.device
        starts = recall is not None if add_bos_token is None else add_bos_token
        self._bos: list[int] = decoder.bos_ids if starts else []
        most = resolve_max_length(decoder.model.config.get_text_config(), self.tokenizer)
        self.max_length = max_length or most - (0 if recall is None else decoder.context_start)
        decoder.model.eval()

    # ---- made by the harness ----

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Memory3LM:
        """From `--model_args` as one string; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None) -> Memory3LM:
        """From `--model_args`.

        Args:
            arg_dict: `pretrained` (by default the model that ships); `bank`, several divided by `;`, absent for closed book;
                `retriever`, `references` of a recall, `min_score` and `at` as in `memory3.Recall` and `memory3.open_bank`;
                `overlap`, the share above which a reference that repeats the question is dropped, or `off` (2/3, paper
                4.4); `no_memory=true`: the tokens of a run with memory, closed book; `device`, `dtype`, `batch_size`,
                `max_length`, `add_bos_token`.
            additional_config: `device` and `batch_size` of the harness's own options. `arg_dict` goes before them, as the
                harness's command line fills in a batch size of 1 and `cuda:0` (`_DEFAULT_DEVICE`) where they were not given.

        Raises:
            HarnessError: an argument that is not known, or out of range.
            ModelError: no such model.
            BankError: no such bank.
        """
        options = dict(additional_config or {})
        if options.get("device") == _DEFAULT_DEVICE and not torch.cuda.is_available():
            del options["device"]
        given = {k: v for some in (options, arg_dict) for k, v in some.items() if v is not None}
        if unknown := sorted(set(given) - set(ARGUMENTS)):
            raise HarnessError(f"found model argument {unknown[0]!r}, expected some of {', '.join(ARGUMENTS)}")
        dtype = given.get("dtype")
        overlap = _overlap(given.get("overlap", EVALUATION_OVERLAP))
        batch_size = _batch_size(given.get("batch_size", 1))
        decoder = load(given.get("pretrained"), device=given.get("device"), dtype=None if dtype == "auto" else dtype)
        addresses = [a for a in str(given.get("bank", "")).split(";") if a]
        recall = None
        if addresses and not given.get("no_memory"):
            recall = Recall(
                [open_bank(address, decoder, at=given.get("at")) for address in addresses],
                retriever=given.get("retriever"),
                count=given.get("references"),
                min_score=given.get("min_score"),
                max_overlap=overlap,
                counted=False,
            )
        starts = given.get("add_bos_token", True if addresses else None)
        return cls(decoder, recall, batch_size=batch_size, max_length=given.get("max_length"), add_bos_token=starts)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps with its results: size and dtype, and what was recalled from."""
        info: dict[str, Any] = {
            "model_num_parameters": self.decoder.model.num_parameters(),
            "model_dtype": str(self.decoder.dtype),
        }
        if not isinstance(self.recall, Recall):
            return {**info, "memory": None}
        recall = self.recall
        return {
            **info,
            "memory": {
                "banks": [{"address": bank.address, "version": str(bank.version)} for bank in recall.banks],
                "retriever": recall.retriever,
                "references": recall.count,
                "max_overlap": recall.max_overlap,
            },
        }

    # ---- text and tokens ----

    @property
    def eot_token_id(self) -> int:
        """`</s>`."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: `<s>` where the tokenizer has one, else `</s>`."""
        return (self.decoder.bos_ids or [self.eot_token_id])[0]

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text, by the tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer puts them, unless the text starts with one or the caller decides."""
        if add_special_tokens is None and not string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def _fitted(self, ids: Sequence[int], most: int) -> list[int]:
        """The last `most` tokens; with `<s>` in front, and counted, where sequences start with one."""
        bos = self._bos
        body = ids[len(bos) :] if list(ids[: len(bos)]) == bos else ids
        return [*bos, *body[max(0, len(body) - (most - len(bos))) :]]

    def _words(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    # ---- likelihood ----

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """Of each `(texts, context, continuation)`: the continuation's log-likelihood in nats, and whether greedy search writes it.

        Continuations that differ in their last token only share a forward pass.
        """
        passes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for n, (_, context, continuation) in enumerate(requests):
            passes.setdefault((tuple(context), tuple(continuation[:-1])), []).append(n)
        order = sorted(passes, key=lambda key: (-len(key[0]), key))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for batch in _batches(order, self.batch_size):
                for key, scores in zip(batch, self._scores([self._asked(*key) for key in batch]), strict=True):
                    for n in passes[key]:
                        texts, _, continuation = requests[n]
                        answers[n] = _answer(scores, continuation)
                        self.cache_hook.add_partial("loglikelihood", texts, answers[n])
                        bar.update()
        return [answers[n] for n in range(len(requests))]

    def _asked(self, context: Sequence[int], head: Sequence[int]) -> _Row:
        """A prompt and a response that lacks its last token."""
        if len(head) >= self.max_length - len(self._bos):
            raise HarnessError(
                f"found a continuation of {len(head) + 1} tokens, expected at most {self.max_length - len(self._bos)}: "
                "take a shorter one, or a model that reads more"
            )
        size, ids = self.decoder.spec.chunk_length, self._fitted([*context, *head], self.max_length)
        border = len(ids) - len(head)
        prompts, answers = range(0, border, size), range(border, len(ids), size)
        queries = [self._words(ids[start : min(start + size, border)]) for start in prompts]
        queries += [self._words(ids[start : start + size]) for start in answers[:-1]]
        last = len(prompts) - 1
        reads = (*range(len(prompts)), *range(last, last + len(answers)))
        grid = [place // size for place in range(border)] + [len(prompts) + place // size for place in range(len(head))]
        return _Row(tuple(ids), tuple(grid), tuple(queries), reads, self._words(ids[:border]), len(head) + 1)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, windows of `max_length` tokens where it is longer."""
        windows = [(n, *window) for n, request in enumerate(requests) for window in self._windows(request.args[0])]
        totals = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="Running rolling windows", disable=disable_tqdm) as bar:
            for batch in _batches(windows, self.batch_size):
                scored = self._scores([row for _, row, _ in batch])
                for (n, _, predicted), scores in zip(batch, scored, strict=True):
                    totals[n] += _answer(scores, predicted)[0]
                bar.update(len(batch))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[_Row, list[int]]]:
        """Rows of a text and the tokens that each predicts; chunks are counted from the start of the text through all windows."""
        size, tokens = self.decoder.spec.chunk_length, self.tok_encode(text)
        whole, end = [self.prefix_token_id, *tokens], 0
        for given, predicted in get_rolling_token_windows(tokens, whole[0], self.max_length - len(self._bos), 1):
            end += len(predicted)
            start = end - len(given)
            low, last = start // size, (end - 1) // size
            first = max(low - 1, 0)
            queries = tuple(self._words(whole[c * size : (c + 1) * size]) for c in range(first, last))
            ids = self._fitted(given, self.max_length)
            grid = [0] * (len(ids) - len(given)) + [place // size - low for place in range(start, end)]
            reads = tuple(c - 1 - first for c in range(low, last + 1))
            yield _Row(tuple(ids), tuple(grid), queries, reads, text, len(predicted)), predicted

    @torch.no_grad()
    def _scores(self, rows: Sequence[_Row]) -> list[Tensor]:
        """Log-probabilities `(scored, V)` of every row, in float32, from one forward pass."""
        grid, memory = [row.grid for row in rows], self.recall is not None
        layout = self.decoder.layout([row.ids for row in rows], grid=grid, memory=memory)
        reading = self.decoder.reading(layout.chunks, self._memories(rows)) if memory else None
        keep = max(row.scored for row in rows)
        logits = self.decoder.forward(layout, reading, logits_to_keep=keep).logits
        return [logits[b, keep - row.scored :].float().log_softmax(-1) for b, row in enumerate(rows)]

    def _memories(self, rows: Sequence[_Row]) -> list[list[Sequence[Memory]]]:
        """What each chunk of each row reads; the same query of the same text is asked once."""
        assert self.recall is not None
        asked = list(dict.fromkeys((query, row.text) for row in rows for query in row.queries if query))
        found = dict(zip(asked, self.recall([q for q, _ in asked], [t for _, t in asked]), strict=True)) if asked else {}
        tables = []
        for row in rows:
            brought: list[Sequence[Memory]] = []
            for query in row.queries:
                brought.append(found[query, row.text].memories if query else brought[-1] if brought else ())
            tables.append([brought[read] if read >= 0 else () for read in row.reads])
        return tables

    # ---- generation ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        said: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for settings, members in groups.items():
                members.sort(key=lambda n: -len(requests[n].args[0]))
                for batch in _batches(members, self.batch_size):
                    texts = self._written([requests[n].args[0] for n in batch], json.loads(settings))
                    for n, text in zip(batch, texts, strict=True):
                        said[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(batch))
        return [said[n] for n in range(len(requests))]

    def _written(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(settings))
        stops = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        new = int(options.pop("max_gen_toks"))
        room = self.max_length - new
        if room <= len(self._bos):
            raise HarnessError(
                f"found max_gen_toks={new}, expected less than the {self.max_length} tokens that the model takes: "
                "set --gen_kwargs max_gen_toks=…"
            )
        rows = [self._fitted(self.tok_encode(context) or [self.prefix_token_id], room) for context in contexts]
        prompts = [Prompt(tuple(ids), (True,) * len(ids)) for ids in rows]
        config = self._config(options)
        seed = int(torch.randint(2**31, (1,))) if config.do_sample else 0
        until = _Until(self.tokenizer, rows, [stop for stop in stops if stop])
        done = complete(
            self.decoder, prompts, recall=self.recall, config=config, max_new_tokens=new, seed=seed, stopping=[until]
        )
        return [postprocess_generated_text(one.text, stops, None) for one in done]

    def _config(self, options: Mapping[str, Any]) -> Any:
        """The model's generation settings under those of the task."""
        config = deepcopy(self.decoder.model.generation_config)
        for name, value in options.items():
            if not hasattr(config, name):
                raise HarnessError(f"found generation setting {name!r}, expected those of transformers, until and max_gen_toks")
            setattr(config, name, value)
        if not config.do_sample:
            config.temperature = None
        return config


@dataclass(frozen=True)
class _Until:
    """Ends a sequence whose answer holds a stop string; where that begins is known by the prompt that it starts with.

    Of two prompts that fit the longer is taken: at worst a sequence ends late, and what is too much is cut off anyway.
    """

    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    stops: Sequence[str]

    def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """`(1,)` bool for ids `(1, L)`."""
        row = ids[0].tolist()
        start = max(len(prompt) for prompt in self.prompts if row[: len(prompt)] == list(prompt))
        text = self.tokenizer.decode(row[start:], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops)], device=ids.device)


def _answer(scores: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of the tokens under `(tokens, V)` log-probabilities, and whether each is the likeliest."""
    target = torch.tensor(continuation, device=scores.device)
    total = scores.gather(-1, target[:, None]).sum()
    return float(total), bool((scores.argmax(-1) == target).all())


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _overlap(value: Any) -> float | None:
    if value in ("off", False):
        return None
    if isinstance(value, int | float) and 0 < value <= 1:
        return float(value)
    raise HarnessError(f"found overlap={value!r}, expected a share above 0 and at most 1, or off")


def _batch_size(value: Any) -> int:
    if str(value).startswith("auto"):
        return AUTO_BATCH
    if not str(value).isdigit() or int(value) < 1:
        raise HarnessError(f"found batch_size={value!r}, expected a whole number of at least 1, or auto")
    return int(value)


def run_harness(args: Sequence[str]) -> None:
    """The harness's own command line with `--model memory3` in its list; `args` are what follows `lm_eval`.

    Tasks without a `--model` are run with ours. It reads them from `sys.argv`, which is as before afterwards, and ends wrong ones with `SystemExit`.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    names = [arg.partition("=")[0] for arg in args]
    ours = ("--model", NAME) if {"--tasks", "-t"} & set(names) and not {"--model", "-M"} & set(names) else ()
    sys.argv = ["lm_eval", *args, *ours]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    import memory3.evaluate.harness as harness  # under its own name it registers itself, once

    try:
        harness.run_harness(sys.argv[1:])
    except Memory3Error as error:
        sys.exit(f"memory3: {error}")
else:
    register_model(NAME)(Memory3LM)
