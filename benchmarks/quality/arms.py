"""The arms of the quality runs: the method, its ablations, and trials of ideas that may close its gap to dense."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

REFRESH_EVERY = 40
#: Learning rate of the sparse weights over that of the others, where an arm scales it.
LR_SCALE = 2.0
#: The decay on weights of the original SR-STE.
SR_DECAY = 2e-4
TOO_LARGE = 50


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train.

    options            of the backend
    later              {step: options that change from that step on}, ascending; a step of the optimizer, from 0
    decay_follows_lr   the decay in force is that of the options times learning rate / peak learning rate
    saliency           masks keep the largest |w| * v^saliency, v being Adam's second moment; 0: |w|, by the product
    half               feed-forward layers of half the width
    feed_forward_lr    learning rate of feed-forward weights over that of the others, sparse or not
    share              of the steps: the schedule ends so much earlier
    """

    options: Mapping[str, Any]
    later: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    decay_follows_lr: bool = False
    saliency: float = 0.0
    half: bool = False
    feed_forward_lr: float = 1.0
    share: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, for the record."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default and v != {}}

    def options_at(self, step: int) -> dict[str, Any]:
        """The options in force in the optimizer step `step`."""
        found = dict(self.options)
        for begin, changed in self.later.items():
            if step >= begin:
                found |= changed
        return found


def _fst(decay: float, steps: int) -> dict[str, Any]:
    return {"decay": decay, "dense_after": steps - steps // 6}


def ablations(decay: float, steps: int) -> dict[str, Arm]:
    """Dense, FST, and FST without one of its parts. decay: lambda; steps: of the whole run."""
    fst, sparse_end = _fst(decay, steps), {"dense_after": None}
    dense = {"dense_after": 0, "virtual_flips": True}
    return {
        "dense": Arm(dense),
        "fst": Arm(fst),
        "fst-lr": Arm({**fst, "lr_scale": LR_SCALE}),
        "lr-mixed-wgrad": Arm({**fst, "lr_scale": LR_SCALE, "wgrad": "mixed"}),
        "lr-dense-wgrad": Arm({**fst, "lr_scale": LR_SCALE, "wgrad": "dense"}),
        "fst-sparse-end": Arm({**fst, **sparse_end}),
        "fst-dense-wgrad": Arm({**fst, "wgrad": "dense"}),
        "decay-too-large": Arm({**fst, "decay": TOO_LARGE * decay}),
        "sr-ste": Arm({**fst, "decay": SR_DECAY, "decay_on": "weight"}),
        "ste": Arm({**sparse_end, "decay": 0.0, "wgrad": "dense"}),
        "s-ste": Arm({**sparse_end, "recipe": "s-ste"}),
        "half": Arm(dense, half=True),
        "dense-lr": Arm(dense, feed_forward_lr=LR_SCALE),
        "dense-short": Arm(dense, share=8 / 9),
    }


def trials(decay: float, steps: int, refresh_every: int) -> dict[str, Arm]:
    """FST with one thing changed, and some with two or three of them. refresh_every: what FST has."""
    fst, often, seldom = _fst(decay, steps), max(1, refresh_every // 4), 4 * refresh_every
    third, faster = {"dense_after": steps - steps // 3}, {**fst, "lr_scale": LR_SCALE}
    mvue_off = {steps * 2 // 3: {"wgrad": "dense"}}
    grows = {steps // 6: {"refresh_every": refresh_every}, steps // 2: {"refresh_every": seldom}}
    return {
        "decay-by-lr": Arm(fst, decay_follows_lr=True),
        "mvue-off-late": Arm(fst, later=mvue_off),
        "refresh-grows": Arm({**fst, "refresh_every": often}, later=grows),
        "dense-third": Arm({**fst, **third}),
        "saliency-v4": Arm(fst, saliency=1 / 4),
        "saliency-v2": Arm(fst, saliency=1 / 2),
        "combined": Arm(fst, later=mvue_off, decay_follows_lr=True),
        "lr-dense-start": Arm({**faster, "sparse_after": steps // 10}),
        "lr-dense-third": Arm({**faster, **third}),
        "lr-dense-ends": Arm({**faster, **third, "sparse_after": steps // 10, "wgrad": "dense"}),
        "lr-mvue-off-early": Arm({**faster, "wgrad": "dense"}, later={steps // 3: {"wgrad": "mvue"}}),
        "lr-mvue-off-late": Arm(faster, later={steps // 2: {"wgrad": "dense"}}),
        "lr-sparse-end": Arm({**faster, "dense_after": None}),
        "lr-more": Arm({**fst, "lr_scale": 1.5 * LR_SCALE}),
        "lr-s-ste": Arm({"dense_after": None, "recipe": "s-ste", "lr_scale": LR_SCALE}),
    }


def arms(decay: float, steps: int, refresh_every: int = REFRESH_EVERY) -> dict[str, Arm]:
    return {**ablations(decay, steps), **trials(decay, steps, refresh_every)}


ABLATIONS, TRIALS = tuple(ablations(1.0, 6)), tuple(trials(1.0, 6, REFRESH_EVERY))
ARMS = (*ABLATIONS, *TRIALS)
_GROUPS = {"ablations": ABLATIONS, "trials": TRIALS, "all": ARMS}


def named(text: str) -> list[str]:
    """The arms of a comma-separated list of names, "ablations", "trials" and "all". Raises ValueError on others."""
    names = [name for part in text.split(",") for name in _GROUPS.get(part, (part,))]
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"found arm {', '.join(unknown)}, need some of {', '.join((*_GROUPS, *ARMS))}")
    return list(dict.fromkeys(names))


def needs_decay(name: str) -> bool:
    """Whether an arm depends on the lambda that is searched."""
    return arms(1.0, 6)[name] != arms(2.0, 6)[name]
