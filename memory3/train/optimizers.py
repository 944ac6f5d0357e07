"""The optimizers of a run: AdamW for everything, or Muon for the matrices inside the model and AdamW for the rest."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from memory3.precision import Float32InsteadOfBf16, computes_bf16
from memory3.train.settings import Settings, TrainError

BETAS = (0.9, 0.95)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some groups and AdamW for the others, as one optimizer with one state.

    Muon makes the steps of a matrix orthogonal, so that no few directions of the gradient drown the others; the size of a
    step is matched to AdamW's (Liu et al. 2025), so that both take the same learning rate and weight decay.

    Args:
        matrices: groups whose parameters have two dimensions; rest: all other groups.
        rate: learning rate of every group that has none of its own.
    """

    def __init__(self, matrices: list[dict[str, Any]], rest: list[dict[str, Any]], rate: float) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=rate, betas=BETAS))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        if closure is not None:
            raise TrainError("found a closure, expected none: the loop makes its gradients before the step")
        start = 0
        for part in self.parts:  # accelerate replaces state and groups when it prepares the optimizer: share them anew
            end = start + len(part.param_groups)
            part.state, part.param_groups, start = self.state, self.param_groups[start:end], end
            with nullcontext() if computes_bf16() else Float32InsteadOfBf16():
                part.step()


def optimizer_of(model: Any, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of the settings for a model's learned parameters.

    Matrices decay, vectors (norms, biases) do not; embeddings, tied to the output or not, have a rate of their own, which is
    the `factor` of their group.

    Raises:
        TrainError: nothing is to be learned.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise TrainError("found a model whose parameters are all frozen, expected some that require a gradient")
    words, decay, factor = model.get_input_embeddings().weight, settings.weight_decay, settings.embedding_rate
    output = getattr(model.get_output_embeddings(), "weight", None)
    inner = [p for p in learned if p.ndim >= 2 and p is not words]
    flat = [p for p in inner if settings.optimizer == "muon" and p.ndim == 2 and p is not output]
    chosen = {id(p) for p in flat}
    rest = [
        {"params": [p for p in inner if id(p) not in chosen], "weight_decay": decay, "factor": 1.0},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        {"params": [p for p in learned if p is words], "weight_decay": decay * factor, "factor": factor},
    ]
    rest = [group for group in rest if group["params"]]
    if not flat:
        return torch.optim.AdamW(rest, lr=settings.schedule.peak, betas=BETAS)
    return MuonAdamW([{"params": flat, "weight_decay": decay, "factor": 1.0}], rest, settings.schedule.peak)
