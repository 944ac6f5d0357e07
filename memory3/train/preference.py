"""Direct preference optimisation by trl, with memory: policy and reference model both read what their own weights encode.

trl's `DPOTrainer` gives collation and loss; the steps are those of `train.loop`, as in every other stage. So a checkpoint is
safetensors and JSON, and resuming is exact: `Trainer.train` keeps optimizer and random state as pickles, which we do not load.
Source: arXiv 2407.01178, 6 (beta 0.01, cosine, at most 4e-6, 10 % warmup); design section 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from memory3.attention import registered_name
from memory3.decoder import Decoder, attach
from memory3.forwarding import memory_in_forward
from memory3.generation import Prompt
from memory3.quiet import without_bars, without_warnings
from memory3.rows import Row
from memory3.spec import SourceError
from memory3.train.grid import Answered, Recalls
from memory3.train.instruct import LONGEST, LikeLength, Tell, conversation, cut, gathered, plain
from memory3.train.settings import TrainError

PEAK, BETA, EPOCHS = 4e-6, 0.01, 1
"""Highest learning rate and beta of the paper; passes over the data, which it does not say."""
_FIGURES = {"rewards/accuracies": "preferred", "rewards/margins": "margin", "logps/chosen": "chosen"}
"""Of what trl measures, and under which names it is told."""


@dataclass(frozen=True)
class Pair:
    """A prompt, the token ids of the better response, and those of the worse, end tokens included."""

    prompt: Prompt
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer response."""
        return len(self.prompt.ids) + max(len(self.chosen), len(self.rejected))


def pairs_of(
    decoder: Decoder, path: Path, *, split: str = "train", longest: int = LONGEST, tell: Tell | None = None
) -> list[Pair]:
    """Pairs of a file of rows; those whose prompt alone is too long, and those of equal responses, are left out.

    A row has `prompt`, `chosen` and `rejected` as plain text; or `chosen` and `rejected` as messages, with the prompt before
    their last (UltraFeedback) or under `prompt`.

    Args:
        decoder: gives the tokenizer.
        path: a table, see `memory3.rows.rows`.
        split: rows that have a `split` of another name are left out.
        longest: most tokens of a prompt with a response; a longer response is cut.
        tell: told of the rows done.

    Raises:
        SourceError: the file, or a row of it, cannot be read.
        TrainError: no pair is left.
    """

    def made(where: str, row: Row) -> Pair | None:
        chosen, rejected = (cut(side, longest) for side in _sides(decoder, row, where))
        if not chosen or not rejected or chosen.response == rejected.response:
            return None
        return Pair(chosen.prompt, chosen.response, rejected.response)

    found, count = gathered(path, made, split, tell)
    if not found:
        raise TrainError(
            f"found no pair of responses among {count} rows of {path}, expected some of split {split!r}: give other data"
        )
    return found


def _sides(decoder: Decoder, row: dict[str, Any], where: str) -> list[Answered]:
    """The better and the worse example of a row."""
    sides = [_side(decoder, row.get("prompt"), row.get(name), where) for name in ("chosen", "rejected")]
    if sides[0].prompt != sides[1].prompt:
        raise SourceError(f"found two responses to different prompts at {where}, expected one prompt for both")
    return sides


def _side(decoder: Decoder, prompt: Any, response: Any, where: str) -> Answered:
    if isinstance(response, str) and isinstance(prompt, str):
        return plain(decoder, prompt, response, where)
    if isinstance(response, list):
        return conversation(decoder, [*(prompt if isinstance(prompt, list) else []), *response], where)
    raise SourceError(f"found no pair at {where}, expected chosen and rejected, both texts beside a prompt or both messages")


class Preference:
    """An `Objective`: the sigmoid loss of DPO; made by `preference`.

    Args:
        trainer: of trl, whose model is the decoder's and whose reference model is the frozen one's.
        pairs: at least one.
        frozen: decoder of the reference model.
        size: pairs of a batch.
        seed: of the order.
        recall: brings the texts that chunks read; `None` for plain passes.
    """

    def __init__(
        self, trainer: Any, pairs: Sequence[Pair], frozen: Decoder, size: int, seed: int, recall: Recalls | None
    ) -> None:
        self.trainer, self.pairs, self.frozen, self.recall = trainer, pairs, frozen, recall
        self.batches = LikeLength([pair.length for pair in pairs], size, seed)

    def batch(self, step: int) -> list[int]:
        """Numbers of the pairs of a step, the same whenever asked."""
        return self.batches(step)

    def tokens(self, batch: Sequence[int]) -> int:
        """Tokens of both rows of each pair, padding and references not counted."""
        chosen = [self.pairs[n] for n in batch]
        return sum(2 * len(pair.prompt.ids) + len(pair.chosen) + len(pair.rejected) for pair in chosen)

    def loss(self, decoder: Decoder, batch: Sequence[int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean `()` of `-log sigmoid(beta * margin)`; the share of pairs whose better response is preferred, and the margin."""
        chosen = [self.pairs[n] for n in batch]
        inputs = self.trainer.data_collator([_ids(pair) for pair in chosen])
        inputs = {name: value.to(decoder.device) for name, value in inputs.items()}
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # trl asks transformers in words of an older version
            if self.recall is not None:
                prompts = [pair.prompt for pair in chosen] * 2  # the batch holds all better responses, then all worse
                for one in (decoder, self.frozen):
                    stack.enter_context(memory_in_forward(one, self.recall, prompts=lambda call: prompts))
            loss = self.trainer.compute_loss(decoder.model, inputs)
        measured = self.trainer._metrics["train" if decoder.model.training else "eval"]  # its own log() would print them
        figures = {ours: float(measured[theirs][-1]) for theirs, ours in _FIGURES.items() if measured.get(theirs)}
        measured.clear()
        return loss, figures


def _ids(pair: Pair) -> dict[str, list[int]]:
    """A pair as trl's collator takes it."""
    return {"prompt_ids": [*pair.prompt.ids], "chosen_ids": [*pair.chosen], "rejected_ids": [*pair.rejected]}


@contextmanager
def preference(
    decoder: Decoder,
    pairs: Sequence[Pair],
    size: int,
    seed: int,
    recall: Recalls | None = None,
    beta: float = BETA,
) -> Iterator[Preference]:
    """The objective of a run that starts with the decoder's present weights: they are copied as the reference model.

    A run that goes on from a checkpoint begins here with the same first weights; the loop loads the checkpoint afterwards. The
    block leaves the model as `from_pretrained` made it, but for its weights and for dropout, which trl sets to 0.

    Args:
        decoder: of the policy, to be trained.
        pairs: at least one.
        size: pairs of a batch.
        seed: of the order.
        recall: brings the texts that chunks read (`RecalledTexts`): the policy encodes them with its weights and with
            gradient, the reference model with its own. `None` trains without memory.
        beta: how dear it is to leave the reference model.

    Raises:
        TrainError: trl is not installed.
    """
    with TemporaryDirectory() as scratch, _unchanged(decoder.model), ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the copy was no more trained for memory than the policy
            frozen = stack.enter_context(_copied(decoder))
        trainer = _trainer(decoder, frozen, pairs, Path(scratch), size, seed, beta)
        yield Preference(trainer, pairs, frozen, size, seed, recall)


def _copied(decoder: Decoder) -> Decoder:
    """A decoder of its own over a copy of the model."""
    model = deepcopy(decoder.model)
    model.set_attn_implementation(str(model.config.get_text_config()._attn_implementation).removeprefix(registered_name("")))
    return attach(model, decoder.tokenizer, decoder.spec)


def _trainer(
    decoder: Decoder,
    frozen: Decoder,
    pairs: Sequence[Pair],
    scratch: Path,
    size: int,
    seed: int,
    beta: float,
) -> Any:
    """trl's trainer, which sends nothing, writes nothing outside `scratch` and is quiet."""
    with _quiet():
        try:
            from datasets import Dataset
            from trl import DPOConfig, DPOTrainer
        except ImportError:
            raise TrainError("found no trl, expected it for DPO: pip install 'memory3[train]'") from None

        class Tokenised(DPOTrainer):  # type: ignore[misc]
            """Takes pairs that are token ids already, cut as generation sees them."""

            def _prepare_dataset(self, dataset: Any, *options: Any) -> Any:
                return dataset

        # The loop has its own autocast around the whole step, so trl's stays off.
        options: dict[str, Any] = {"bf16": False, "beta": beta, "seed": seed}
        options |= {"per_device_train_batch_size": size, "max_length": None, "gradient_checkpointing": False}
        options |= {"report_to": "none", "push_to_hub": False, "save_strategy": "no", "disable_tqdm": True}
        options |= {"use_cpu": not torch.cuda.is_available(), "remove_unused_columns": False}
        return Tokenised(
            decoder.model,
            frozen.model,
            DPOConfig(output_dir=str(scratch), **options),
            train_dataset=Dataset.from_list([_ids(pair) for pair in pairs]),
            processing_class=deepcopy(decoder.tokenizer),  # it may be given a padding token
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, no bars and no telemetry of transformers, datasets, trl and the hub inside the block; then as before."""
    from huggingface_hub import constants

    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with warnings.catch_warnings(), without_bars(), without_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """What trl sets on a model goes again: its own forward, the padding token and the tags."""
    configs = [model.config.get_text_config(), *([model.generation_config] if model.generation_config else [])]
    padding, forward, tags = [c.pad_token_id for c in configs], vars(model).get("forward"), vars(model).get("model_tags")
    try:
        yield
    finally:
        for config, token in zip(configs, padding, strict=True):
            config.pad_token_id = token
        for name, value in (("forward", forward), ("model_tags", tags)):
            vars(model).pop(name, None)
            if value is not None:
                setattr(model, name, value)
