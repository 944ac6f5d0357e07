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

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens for a batch and says which sequences have ended.

    Build it with `Sampler.of`. `processors`, `most` and `generators` have one entry per sequence.
    """

    processors: tuple[Any, ...]
    criteria: Any
    most: tuple[int, ...]
    ends: frozenset[int]
    sample: bool
    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(
        cls, decoder: Decoder, config: Any, max_new_tokens: int | None, seed: int, lengths: Sequence[int], stopping: Any
    ) -> Sampler:
        """From a transformers `GenerationConfig`, by default the model's; `SpecError` for what this loop cannot do.

        `lengths` are the tokens of each prompt, its own `<s>` included.
        """
        from transformers import StoppingCriteriaList
        from transformers.generation import MaxTimeCriteria, StopStringCriteria

        chosen = deepcopy(config if config is not None else decoder.model.generation_config)
        _check(chosen)
        ends = chosen.eos_token_id if chosen.eos_token_id is not None else decoder.tokenizer.eos_token_id
        end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        criteria = StoppingCriteriaList(list(stopping or []))
        if chosen.stop_strings:
            criteria.append(StopStringCriteria(tokenizer=decoder.tokenizer, stop_strings=chosen.stop_strings))
        if chosen.max_time:
            criteria.append(MaxTimeCriteria(chosen.max_time))
        return cls(
            tuple(_processors(chosen, length, end_ids, decoder.device) for length in lengths),
            criteria,
            tuple(_most(chosen, max_new_tokens, length) for length in lengths),
            frozenset(end_ids),
            bool(chosen.do_sample),
            tuple(torch.Generator(device=decoder.device).manual_seed(seed + n) for n in range(len(lengths))),
        )

    def next(self, logits: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids `(B,)` from the last logits `(B, V)`, and the processed scores `(B, V)`.

        A sequence of a batch is processed without its padding. Where nothing is to be processed, all are chosen at once.
        """
        if not self.sample and not any(map(len, self.processors)):
            return logits.argmax(-1), logits.float()
        ids, rows = [], []
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            before = torch.tensor([[*prompt, *answer]], device=logits.device)
            scores = self.processors[n](before, logits[n : n + 1].float())
            rows.append(scores[0])
            if self.sample:
                ids.append(torch.multinomial(scores.softmax(-1), 1, generator=self.generators[n])[0, 0])
            else:
                ids.append(scores[0].argmax())
        return torch.stack(ids), torch.stack(rows)

    def finished(self, sequence: int, prompt: Sequence[int], answer: Sequence[int], scores: Tensor) -> str | None:
        """Why a sequence ends after its newest token: `stop`, `length`, or `None` where it goes on; its scores are `(V,)`."""
        if answer[-1] in self.ends:
            return "stop"
        if len(self.criteria):
            ids = torch.tensor([[*prompt, *answer]], device=scores.device)
            if bool(self.criteria(ids, scores[None]).any()):
                return "stop"
        return "length" if len(answer) >= self.most[sequence] else None


def _most(config: Any, max_new_tokens: int | None, length: int) -> int:
    """New tokens of a sequence: the argument, else the configuration's own count, else what its `max_length` leaves."""
    most = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if most is None:
        most = DEFAULT_NEW_TOKENS if config.max_length is None else config.max_length - length
    if most < 1:
        raise SpecError(f"found room for {most} new tokens, expected at least 1: set max_new_tokens, or a longer max_length")
    return int(most)


_HEEDED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample", "eos_token_id",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "use_cache", "pad_token_id", "bos_token_id", "decoder_start_token_id", "early_stopping", "length_penalty",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "disable_compile", "compile_config", "low_memory", "transformers_version", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "max_matching_ngram_size", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    "continuous_batching_config", "assistant_early_exit", "assistant_ensemble_weight", "speculation_type",
}  # fmt: skip
"""Fields about caches, outputs, beams and assistants: they never change what greedy search or sampling chooses."""
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
}


def _check(config: Any) -> None:
    """Refuse settings that this loop would otherwise pass over in silence; what transformers does not know is no setting."""
    from transformers import GenerationConfig

    settings = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        known = name in _HEEDED or name in _WITHOUT_EFFECT or name.startswith("_") or name not in settings
        if not known and value not in (None, False, 0, [], {}) and value != _NEUTRAL.get(name):
            raise SpecError(
                f"found {name}={value!r} in the generation settings, expected greedy or sampling without it: "
                f"memory3 decodes by its own loop, which does not do that; set {name}=None"
            )


def _processors(config: Any, length: int, ends: list[int], device: torch.device) -> Any:
    """Those of transformers' processors that the settings ask for, in the order of its `generate`, for a prompt of `length` tokens.

    What is not set is not applied: `generate` itself would add `top_k=50` when it samples.
    """
    from transformers.generation import logits_process as lp

    found = lp.LogitsProcessorList()

    def add(kind: Any, value: Any, *more: Any, neutral: Any = None, **named: Any) -> None:
        if value and value != neutral:
            found.append(kind(value, *more, **named))

    if config.sequence_bias:
        found.append(lp.SequenceBiasLogitsProcessor(sequence_bias=config.sequence_bias))
    add(lp.RepetitionPenaltyLogitsProcessor, config.repetition_penalty, neutral=1.0)
    add(lp.NoRepeatNGramLogitsProcessor, config.no_repeat_ngram_size)
    if config.bad_words_ids:
        found.append(lp.NoBadWordsLogitsProcessor(config.bad_words_ids, eos_token_id=ends or None))
    if ends:
        ending = torch.tensor(ends, device=device)
        add(lp.MinLengthLogitsProcessor, config.min_length, ending, device=str(device))
        if config.min_new_tokens:
            found.append(lp.MinNewTokensLengthLogitsProcessor(length, config.min_new_tokens, ending, device=str(device)))
        if config.exponential_decay_length_penalty:
            found.append(lp.ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, ending, length))
    add(lp.SuppressTokensLogitsProcessor, config.suppress_tokens, device=str(device))
    if config.begin_suppress_tokens:
        found.append(lp.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, length, device=str(device)))
    if config.remove_invalid_values:
        found.append(lp.InfNanRemoveLogitsProcessor())
    if config.do_sample:
        if config.temperature is not None and config.temperature <= 0:
            raise SpecError(
                f"found temperature={config.temperature} for sampling, expected more than 0: set do_sample=False for greedy"
            )
        add(lp.TemperatureLogitsWarper, config.temperature, neutral=1.0)
        add(lp.TopKLogitsWarper, config.top_k)
        if config.top_p is not None and config.top_p < 1.0:
            found.append(lp.TopPLogitsWarper(config.top_p))
        add(lp.MinPLogitsWarper, config.min_p)
        add(lp.TypicalLogitsWarper, config.typical_p, neutral=1.0)
        add(lp.EpsilonLogitsWarper, config.epsilon_cutoff)
        add(lp.EtaLogitsWarper, config.eta_cutoff, device=str(device))
    if config.renormalize_logits:
        found.append(lp.LogitNormalization())
    return found
