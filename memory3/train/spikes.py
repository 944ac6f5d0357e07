"""Notice that a run diverges: against the medians of its own last steps.

The authors' runs diverged twice (design section 4). What helped PaLM (arXiv 2204.02311, 5.1) is done here: go back to a
checkpoint before the spike and go on with other batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from statistics import median

from memory3.train.settings import Settings, TrainError


@dataclass
class Watch:
    """The loss and gradient norm of the last steps that were not high; part of a checkpoint.

    Args:
        losses, norms: of at most `spike_window` steps, oldest first.
        high: high steps since the last that was not.
        tries: spikes since the last checkpoint behind the furthest of them.
        spiked_at: the furthest step that spiked, -1 before the first.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    high: int = 0
    tries: int = 0
    spiked_at: int = -1

    def spiked(self, loss: float, norm: float, settings: Settings) -> bool:
        """Note a step; whether it is, or completes, a spike."""
        if not (isfinite(loss) and isfinite(norm)):
            return True
        if self._is_high(loss, norm, settings):
            self.high += 1
            return self.high >= settings.spike_steps
        self.high = 0
        self.losses = [*self.losses, loss][-settings.spike_window :]
        self.norms = [*self.norms, norm][-settings.spike_window :]
        return False

    def _is_high(self, loss: float, norm: float, settings: Settings) -> bool:
        if 4 * len(self.losses) < settings.spike_window:
            return False
        far = settings.spike_norm * max(median(self.norms), settings.clip)
        return loss > median(self.losses) + settings.spike_loss or norm > far

    def count_spike(self, step: int, loss: float, norm: float, settings: Settings) -> None:
        """One more spike in a row; `TrainError` when there were too many."""
        self.tries, self.spiked_at = self.tries + 1, max(step, self.spiked_at)
        if self.tries >= settings.spike_tries:
            raise TrainError(
                f"found loss {loss:.4g} and gradient norm {norm:.4g} at step {step}, a spike for the {self.tries}. time in a "
                "row, expected numbers near those before: lower the learning rate and run again; or, where the loss is meant "
                "to jump, raise Settings.spike_loss"
            )

    def passed(self, step: int) -> None:
        """A checkpoint of `step` steps is written: one behind the last spike ends the row."""
        if step > self.spiked_at:
            self.tries = 0

    def back_to(self, earlier: Watch) -> Watch:
        """The medians of an earlier checkpoint, with what is known since about spikes."""
        return Watch(list(earlier.losses), list(earlier.norms), 0, self.tries, self.spiked_at)
