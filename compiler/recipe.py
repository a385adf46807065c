"""The recipe: the options of `torch.compile(model, backend="sparse24", options={...})`."""

import difflib
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import OptionError


def _check(name: str, found: object, ok: bool, need: str) -> None:
    if not ok:
        raise OptionError(f"sparse24: found option {name}={found!r}, need {need}")


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_patterns(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)


#: The default of `Recipe.decay`.
DECAY = 2e-4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train 2:4 (arXiv 2404.01847).

    recipe         "fst": what arXiv 2404.01847 does, W.M with transposable masks, refreshed and decayed as below; or
                   "s-ste" (arXiv 2409.09099): each weight is multiplied as beta * soft24(W), which subtracts from a
                   group of four along in_features its second smallest magnitude. It is continuous in W: there are no
                   masks to refresh and no decay. See `kernels.soft` for what it costs; `when` means "always".
    decay          lambda of the masked decay, added once per optimizer step to the gradient of every pruned weight:
                   g += decay * (1 - M) * W. It depends on loss reduction, batch size and optimizer; values from
                   6e-6 to 1e-3 are in use, and 2e-4 is a start for AdamW and a mean loss. 0 turns it off.
                   `sparse24.find_decay` searches it. With "s-ste" it is 0.
    decay_on       "gradient"; or "weight" for the original SR-STE form, W -= lr * decay * (1 - M) * W.
    lr_scale       the learning rate of sparse weights is that of their parameter group times this, also in the dense
                   end. For Adam-like optimizers the best learning rate of a matrix goes with 1 / fan-in, and 2:4 halves
                   the fan-in (arXiv 2405.15743), which makes it 2: see docs/results.md for what that gains. The
                   optimizer's groups, as schedulers, loggers and checkpoints see them, stay as they are.
    refresh_every  optimizer steps between two searches of the masks; the kept values follow W at every step. With
                   "s-ste": between two counts of flips.
    virtual_flips  count flips in the dense phase too, on masks that nothing is multiplied by (the paper's virtual flip
                   rate): with dense_after=0 that of a dense run. The training is not changed by it.
    dense_after    optimizer steps after which all layers are dense (the paper: the last sixth of the run); None: never.
    sparse_after   optimizer steps before which all layers are dense (not in the paper): masks are first searched in
                   weights that have learnt something. A tenth of the run gained a little: see docs/results.md.
    wgrad          "mvue": weight gradients from 2:4-pruned, unbiased output gradients (MVUE); "dense": from dense ones;
                   "mixed": MVUE for up and gate projections, whose gradients the activation has thinned out, dense for
                   the others, where MVUE adds up to three times as much noise (benchmarks/quality/noise.py).
    layers         "ffn"; "all" for attention projections too; or fnmatch patterns of parameter names. Without
                   gradients, weights that are 2:4 already are taken whatever this says.
    skip           fnmatch patterns of parameter names that stay dense.
    when           "faster": each layer is measured on this GPU, its sparse GEMMs and what packing costs against its
                   dense GEMMs, and stays dense where that is faster; "always": sparse everywhere, if need be by masked
                   dense matmuls. On a CPU both mean everywhere. Judged by the forward alone where no gradient is
                   computed.
    seed           of the random draws of "mvue".
    inner          what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
    inductor       Inductor's own options, as torch.compile's options take them.
    strict         raise where a wanted layer would stay dense.

    Raises OptionError (a ValueError) on values out of range.
    """

    decay: float = DECAY
    decay_on: str = "gradient"
    refresh_every: int = 40
    dense_after: int | None = None
    wgrad: str = "mvue"
    layers: str | tuple[str, ...] = "ffn"
    skip: tuple[str, ...] = ()
    when: str = "faster"
    seed: int = 0
    inner: str = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    recipe: str = "fst"
    virtual_flips: bool = False
    lr_scale: float = 1.0
    sparse_after: int = 0

    def __post_init__(self) -> None:
        real = isinstance(self.decay, numbers.Real) and not isinstance(self.decay, bool)
        _check("decay", self.decay, real and 0 <= self.decay < float("inf"), "a finite number >= 0")
        scale = self.lr_scale
        real = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
        _check("lr_scale", scale, real and 0 < scale < float("inf"), "a finite number > 0")
        _check(
            "refresh_every", self.refresh_every, _is_int(self.refresh_every) and self.refresh_every > 0, "an int >= 1"
        )
        after = self.dense_after
        _check("dense_after", after, after is None or (_is_int(after) and after >= 0), "None or an int >= 0")
        begin = self.sparse_after
        _check("sparse_after", begin, _is_int(begin) and begin >= 0, "an int >= 0")
        _check("sparse_after", begin, not after or begin < after, f"less than dense_after, which is {after}")
        _check("seed", self.seed, _is_int(self.seed), "an int")
        for name, valid in _CHOICES.items():
            _check(name, getattr(self, name), getattr(self, name) in valid, " or ".join(map(repr, valid)))
        if self.recipe == "s-ste":
            _check("decay", self.decay, self.decay in (0, DECAY), "none: recipe='s-ste' has no decay, leave it out")
            object.__setattr__(self, "decay", 0.0)
        flag = isinstance(self.virtual_flips, bool)
        _check("virtual_flips", self.virtual_flips, flag, "True or False")
        good = self.layers in ("ffn", "all") if isinstance(self.layers, str) else _is_patterns(self.layers)
        _check("layers", self.layers, good, "'ffn', 'all' or a list of patterns of parameter names")
        _check("skip", self.skip, _is_patterns(self.skip), "a list of patterns of parameter names")
        _check("inductor", self.inductor, isinstance(self.inductor, Mapping), "a dict of Inductor's options")
        _check("strict", self.strict, isinstance(self.strict, bool), "True or False")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> "Recipe":
        """The recipe of torch.compile's options. Raises OptionError that lists the valid ones on an unknown key."""
        valid = [f.name for f in fields(cls)]
        unknown = [key for key in options or {} if key not in valid]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), valid, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise OptionError(f"sparse24: found unknown option {unknown[0]!r}{hint}; valid are {', '.join(valid)}")
        return cls(**(options or {}))

    def wgrad_of(self, role: str) -> str:
        """How the weight gradient of a linear of this role (`Linear.role`) is taken: "mvue" or "dense"."""
        if self.wgrad != "mixed":
            return self.wgrad
        return "mvue" if role in ("up", "gate") else "dense"

    def method(self) -> dict[str, Any]:
        """What decides the numbers of a run, and so has to agree between a saved state and its continuation."""
        return {k: v for k, v in asdict(self).items() if k not in _FREE}


_FREE = ("inner", "inductor", "when", "strict", "virtual_flips")
_CHOICES = {
    "recipe": ("fst", "s-ste"),
    "decay_on": ("gradient", "weight"),
    "wgrad": ("mvue", "dense", "mixed"),
    "when": ("faster", "always"),
    "inner": ("inductor", "aot_eager", "eager"),
}
