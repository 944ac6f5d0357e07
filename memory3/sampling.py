"""The next token and the end, by transformers' own logits processors and stopping criteria."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memory3.decoder import Decoder
from memory3.spec import SpecError


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens for a batch and says which sequences have ended.

    Build it with `Sampler.of`.
    """

    processors: Any
    criteria: Any
    most: int
    ends: frozenset[int]
    sample: bool
    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, decoder: Decoder, config: Any, max_new_tokens: int | None, seed: int, count: int, stopping: Any) -> Sampler:
        """From a transformers `GenerationConfig`, by default the model's; `SpecError` for what this loop cannot do."""
        from transformers import StoppingCriteriaList, StopStringCriteria

        chosen = deepcopy(config if config is not None else decoder.model.generation_config)
        if (chosen.num_beams or 1) > 1 or chosen.penalty_alpha or chosen.assistant_early_exit:
            raise SpecError("found beam, contrastive or assisted search, expected greedy or sampling: set num_beams=1")
        most = max_new_tokens or chosen.max_new_tokens or 64
        if most < 1:
            raise SpecError(f"found max_new_tokens={most}, expected at least 1")
        ends = chosen.eos_token_id if chosen.eos_token_id is not None else decoder.tokenizer.eos_token_id
        end_ids = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        criteria = StoppingCriteriaList(list(stopping or []))
        if chosen.stop_strings:
            criteria.append(StopStringCriteria(tokenizer=decoder.tokenizer, stop_strings=chosen.stop_strings))
        generators = tuple(torch.Generator(device=decoder.device).manual_seed(seed + n) for n in range(count))
        return cls(_processors(chosen), criteria, most, end_ids, bool(chosen.do_sample), generators)

    def next(self, logits: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """Token ids `(B,)` from the last logits `(B, V)`; a sequence of a batch is processed without its padding."""
        rows = []
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = torch.tensor([[*prompt, *answer]], device=logits.device)
            scores = self.processors(ids, logits[n : n + 1].float())
            if self.sample:
                rows.append(torch.multinomial(scores.softmax(-1), 1, generator=self.generators[n])[0, 0])
            else:
                rows.append(scores[0].argmax())
        return torch.stack(rows)

    def finished(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[str | None]:
        """Why each sequence ends: `stop`, `length`, or `None` where it goes on."""
        reasons: list[str | None] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer[-1] in self.ends or (
                len(self.criteria) and bool(self.criteria(torch.tensor([[*prompt, *answer]]), torch.empty(1, 0)).any())
            ):
                reasons.append("stop")
            else:
                reasons.append("length" if len(answer) >= self.most else None)
        return reasons


def _processors(config: Any) -> Any:
    """Those of transformers' processors that its `generate` would build for these settings."""
    from transformers.generation import logits_process as lp

    found = lp.LogitsProcessorList()
    if config.repetition_penalty and config.repetition_penalty != 1.0:
        found.append(lp.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(lp.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        found.append(lp.NoBadWordsLogitsProcessor(config.bad_words_ids))
    if config.suppress_tokens:
        found.append(lp.SuppressTokensLogitsProcessor(config.suppress_tokens))
    if not config.do_sample:
        return found
    if config.temperature and config.temperature != 1.0:
        found.append(lp.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(lp.TopKLogitsWarper(config.top_k))
    if config.top_p and config.top_p < 1.0:
        found.append(lp.TopPLogitsWarper(config.top_p))
    if config.min_p:
        found.append(lp.MinPLogitsWarper(config.min_p))
    return found
