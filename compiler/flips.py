"""Flips of masks: counted where no refresh counts them, and watched for an explosion.

The flip rate of a healthy run rises early, then falls toward zero as the learning rate falls. That it stays high or
grows is the early sign of lost accuracy (arXiv 2404.01847). `find_decay` judges it against a dense run; the rule here
needs no second run, and its constants are ours.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .weights import SparseWeight

log = logging.getLogger("sparse24")

#: Refreshes whose mean is compared.
WINDOW = 5
#: Flip rates below this are never called an explosion.
NEGLIGIBLE = 0.01


class FlipWatch:
    """The explosion rule on one run's flip rates, m being the mean rate of the last `WINDOW` refreshes:

    growing      m is over 1.5 times the mean of the `WINDOW` refreshes before, and the learning rate did not rise since
    stays high   the mean learning rate there is below half the highest, and m is over 0.7 times the highest m seen

    A healthy rate falls about as the learning rate does. Of the runs in benchmarks/results/quality, dense ones among
    them, one is called an explosion: STE, without any decay, on the translation. There m was 0.72 of its highest when
    the learning rate had come down to half, and the loss ended at ten times dense's; in the others it was at most 0.65.
    Nothing is said where m < `NEGLIGIBLE`, and each of the two once a run; a resumed run, and one whose refresh
    interval changes, is watched anew.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []  # (rate, learning rate) of the last 2 * WINDOW refreshes
        self._highest, self._highest_lr, self._every = 0.0, 0.0, 0
        self._said: set[str] = set()

    def observe(self, rate: float, lr: float, every: int) -> str | None:
        """Take in the rate of a refresh, the learning rate there and the steps since the refresh before it; which rule
        it broke, in words, or None.
        """
        if every != self._every:  # rates over different numbers of steps do not compare
            self._seen, self._highest, self._every = [], 0.0, every
        self._seen = [*self._seen, (rate, lr)][-2 * WINDOW :]
        self._highest_lr = max(self._highest_lr, lr)
        if len(self._seen) < 2 * WINDOW:
            return None
        before, mean = (sum(r for r, _ in part) / WINDOW for part in (self._seen[:WINDOW], self._seen[WINDOW:]))
        self._highest = max(self._highest, before, mean)
        if mean < NEGLIGIBLE:
            return None
        if mean > 1.5 * before and lr <= self._seen[0][1]:
            return self._once(
                "growing",
                f"it grew from {before:.4f} to {mean:.4f} (means of {WINDOW} refreshes) while the learning rate did "
                "not rise",
            )
        mean_lr = sum(lr for _, lr in self._seen[WINDOW:]) / WINDOW
        if mean_lr < 0.5 * self._highest_lr and mean > 0.7 * self._highest:
            return self._once(
                "high",
                f"it is {mean:.4f} (mean of {WINDOW} refreshes), near its highest of {self._highest:.4f}, though their "
                f"mean learning rate, {mean_lr:g}, is below half the highest, {self._highest_lr:g}",
            )
        return None

    def _once(self, rule: str, text: str) -> str | None:
        if rule in self._said:
            return None
        self._said.add(rule)
        return text


_watches: Any = weakref.WeakKeyDictionary()  # optimizer -> FlipWatch


def begin(stepping: Sequence[SparseWeight]) -> None:
    """Before a step: the first mask, which counts no flips, of weights whose flips are counted apart."""
    for weight in stepping:
        if weight.counts_apart and not weight.counted:
            weight.count_flips()


def count(refreshed: Sequence[SparseWeight]) -> None:
    """After a step at the refresh interval: count the flips of the weights whose flips are counted apart."""
    apart = [weight for weight in refreshed if weight.counts_apart]
    found = [(weight, changed) for weight in apart if (changed := weight.count_flips()) is not None]
    numbers = torch.stack([changed.cpu() for _, changed in found]).tolist() if found else []
    for (weight, _), changed in zip(found, numbers, strict=True):
        weight.flips = changed


def watch(optimizer: torch.optim.Optimizer, refreshed: Sequence[SparseWeight]) -> None:
    """Log a warning where the pooled flip rate of an optimizer's sparse weights explodes; see `FlipWatch`."""
    sparse = [weight for weight in refreshed if weight.sparse and weight.flips is not None]
    if not sparse:
        return
    rate = sum(w.flips or 0 for w in sparse) / sum(w.shape[0] * w.shape[1] for w in sparse)
    lr, recipe = max(float(group["lr"]) for group in optimizer.param_groups), sparse[0].recipe
    found = _watches.setdefault(optimizer, FlipWatch()).observe(rate, lr, recipe.refresh_every)
    if found is not None:
        what = f"raise decay (now {recipe.decay:g}), or search it with sparse24.find_decay"
        if recipe.recipe == "s-ste":
            what = "lower the learning rate"
        log.warning(
            "sparse24: the flip rate over %d steps explodes at step %d: %s. It should fall with the learning rate; "
            "masks that keep flipping cost accuracy: %s",
            recipe.refresh_every,
            sparse[0].step,
            found,
            what,
        )
