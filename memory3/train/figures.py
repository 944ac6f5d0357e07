"""Figures of a run: means since the last report, tokens and FLOPs a second, and where they are written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any


def flops_per_token(model: Any, length: int = 0) -> float:
    """FLOPs that training on one token takes, a multiply-add counting as 2.

    A matrix of n parameters multiplies each token once: 2 n forward, 2 n for the gradient of its input, 2 n for its own
    (none where it is frozen), so 6 N in all (Kaplan et al., arXiv 2001.08361, 2.1). Attention adds `6 L length d` with
    `d = heads * head dim`: a token meets `length / 2` others on average, once for scores and once for values (arXiv
    2407.01178, Appendix A; design section 5). Looked-up embeddings multiply nothing, but count where they are the output
    matrix too. Of experts only the chosen ones count. A window is counted as if it were none. What references cost is
    left out: it is the price of reading, not training tokens.

    Args:
        model: a transformers causal LM; may be on the meta device.
        length: tokens of a sequence; 0 leaves attention out.
    """
    config = model.config.get_text_config()
    words, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = output is None or output.weight is not words
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    chosen = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    total = 0.0
    for name, p in model.named_parameters():
        if p.ndim >= 2 and not (looked_up and p is words):
            total += (6 if p.requires_grad else 4) * p.numel() * (chosen if ".experts." in name else 1.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention: float = 6.0 * config.num_hidden_layers * length * config.num_attention_heads * head_dim
    return total + attention


class Means:
    """Means of figures since they were last taken; a figure may be missing in some steps."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, figures: dict[str, float]) -> None:
        """Take in the figures of one step or micro-batch."""
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(value)

    def taken(self, together: Callable[[list[Any]], Sequence[dict[str, list[float]]]]) -> dict[str, float]:
        """The means over all processes, and an empty start; `together` gathers a list's items from all of them."""
        own, self.sums = self.sums, {}
        merged: dict[str, list[float]] = {}
        for sums in together([own]):
            for name, values in sums.items():
                merged.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in merged.items()}


class Meter:
    """Tokens a second, model FLOPs a second, and their share of what the devices can do."""

    def __init__(self, flops_per_token: float, peak_flops: float | None) -> None:
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens, self.since = 0.0, time.monotonic()

    def taken(self) -> dict[str, float]:
        """Rates since they were last taken; empty where the objective counts no tokens."""
        tokens, seconds = self.tokens, max(time.monotonic() - self.since, 1e-9)
        self.tokens, self.since = 0.0, time.monotonic()
        if not tokens:
            return {}
        flops = tokens * self.flops_per_token / seconds
        share = {"flop_use": flops / self.peak_flops} if self.peak_flops else {}
        return {"tokens_per_s": tokens / seconds, "flops_per_s": flops, **share}


class Log:
    """`log.jsonl`, a line for each report, and `tensorboard/` where it is installed. After a kill, steps may stand twice."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board = _board(folder / "tensorboard", step)

    def write(self, line: dict[str, float]) -> None:
        """Append a line; a number that is not finite becomes null, for JSON knows none."""
        self.file.write(json.dumps({k: v if isfinite(v) else None for k, v in line.items()}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Finish both."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)
