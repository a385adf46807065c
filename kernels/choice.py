"""Which provider and which of its algorithms multiplies: chosen by measurement, once for a GPU, library versions and
shape.

Every candidate's numbers are checked against the masked dense product before it is timed: some algorithms of some
versions of cuSPARSELt return wrong numbers without an error (pytorch#155333). Choices are kept on disk, in
$SPARSE24_CACHE or ~/.cache/sparse24; a cache that is damaged, or of another GPU or version, is ignored with a warning.
"""

import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from . import cusparselt, gluon_matmul, layout
from .providers import PROVIDERS, Gluon, MaskedDense, Problem, Provider

log = logging.getLogger("sparse24")

#: Relative error (Frobenius) above which a candidate is struck: twice what rounding the result to bf16 costs, plus
#: summation.
TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class Choice:
    """provider and algorithm for a problem, its time and that of the dense product of the same shape, in ms (nan: not
    measured).
    """

    provider: str
    algorithm: int | None = None
    ms: float = float("nan")
    dense_ms: float = float("nan")


#: So many of the fastest candidates are timed once more, in turns. Each was timed alone before, at the clock that it
#: met: on an H200 an algorithm was taken that is 13% slower under load than another (benchmarks/results/h200, forward
#: of 1024 x 4096: 20 in gluon_waits.json, 17 in gluon_before.json).
_LAST = 4
_TURNS, _TURN_MS = 9, 3.0
_ROWS = 512  # of which the addresses of the metadata are held at once where data is drawn
KERNEL = "kernel"  # what stands for a provider in the cache where one kernel was timed
_BY_NAME: dict[str, Provider] = {p.name: p for p in PROVIDERS}
_choices: dict[Problem, Choice] = {}
_fused: dict[tuple[Problem, str, torch.dtype | None], Choice] = {}  # KERNEL: two kernels are faster


def matmul(problem: Problem, packed: Tensor, x: Tensor) -> Tensor:
    """The product, by the chosen provider."""
    choice = choose(problem)
    try:
        return _BY_NAME[choice.provider].run(problem, packed, x, choice.algorithm)
    except cusparselt.Failed as error:  # the choice was measured for the rounded number of tokens
        log.warning("sparse24: %s fails for %s, masked dense matmuls serve: %s", choice.provider, problem, error)
        _choices[problem] = Choice(MaskedDense.name)
        return matmul(problem, packed, x)
    except gluon_matmul.Failed as error:
        gluon_matmul.withdraw(problem.device, str(error))
        del _choices[problem]  # chosen anew among the others
        return matmul(problem, packed, x)


def matmul_glu(
    problem: Problem, packed: Tensor, x: Tensor, bias: Tensor | None, kind: str, glu: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """`matmul` of an "spmm" and glu(product, bias, kind), both: by one of our own kernels where that is faster."""
    variant = _fusing(problem, kind, None if bias is None else bias.dtype, glu)
    if variant is not None:
        try:
            return gluon_matmul.multiply_glu(variant, packed, x, problem.rows, bias, kind)
        except gluon_matmul.Failed as error:
            gluon_matmul.withdraw(problem.device, str(error))
    y = matmul(problem, packed, x)
    return y, glu(y, bias, kind)


def _fusing(problem: Problem, kind: str, bias: torch.dtype | None, glu: Callable[..., Tensor]) -> int | None:
    """The variant that serves an spmm with the activation behind it, None where two kernels are faster."""
    if not (_BY_NAME[Gluon.name].supports(problem) and gluon_matmul.fusing(problem.device, problem.rows, kind)):
        return None
    found = _fused.get((problem, kind, bias))
    if found is None and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be measured here
    if found is None:
        rounded, store = _rounded(problem), _store(problem.device)
        key = f"{_key(rounded)} {kind} {bias}".replace("torch.", "")
        if key not in store.choices:
            store.add(key, _measure_fused(rounded, kind, bias, glu))
        found = _fused[problem, kind, bias] = store.choices[key]
    return found.algorithm if found.provider == Gluon.name else None


def choose(problem: Problem) -> Choice:
    """The choice for a problem, measured at first use. Numbers of tokens close to each other share one measurement."""
    found = _choices.get(problem)
    if found is None:
        found = _choices[problem] = _find(problem)
    return found


def _find(problem: Problem) -> Choice:
    first = next(p for p in PROVIDERS if p.supports(problem))
    if problem.device.type != "cuda" or isinstance(first, MaskedDense):
        return Choice(first.name)
    if torch.cuda.is_current_stream_capturing():
        return Choice(first.name)  # nothing can be measured here; a later call outside of a capture does not come
    rounded = _rounded(problem)
    store = _store(problem.device)
    key = _key(rounded)
    known = store.choices.get(key)
    withdrawn = known is not None and known.provider == Gluon.name and not _BY_NAME[known.provider].supports(rounded)
    if known is None or withdrawn:
        store.add(key, measure(rounded))
    return store.choices[key]


def _rounded(problem: Problem) -> Problem:
    """The problem with its number of tokens rounded up to eight steps an octave."""
    spmm = problem.direction == "spmm"
    tokens = problem.outer if spmm else problem.inner
    step = max(64, 1 << max(0, tokens.bit_length() - 4))
    tokens = -(-tokens // step) * step
    outer, inner = (tokens, problem.inner) if spmm else (problem.outer, tokens)
    return Problem(problem.direction, problem.rows, inner, outer, problem.dtype, problem.device)


def kept(device: torch.device, key: str, measure: Callable[[], float]) -> float:
    """A measured time in ms, from the cache where it is there."""
    store = _store(device)
    if key not in store.choices:
        store.add(key, Choice(KERNEL, ms=measure()))
    return store.choices[key].ms


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(problem: Problem, providers: Sequence[Provider] | None = None) -> Choice:
    """Check and time every candidate (of `providers`, by default all) on random data; the fastest right one, or else
    the masked dense product. Some milliseconds to a second; compiling the Gluon kernels takes longer.
    """
    with torch.no_grad(), torch.cuda.device(problem.device):
        packed, x, dense = _data(problem)
        expected = dense()
        right: list[tuple[float, Provider, int | None]] = []
        for provider in PROVIDERS if providers is None else providers:
            if isinstance(provider, MaskedDense) or not provider.supports(problem):
                continue
            for algorithm in _algorithms(provider, problem):
                run = partial(provider.run, problem, packed, x, algorithm)
                best = min((ms for ms, *_ in right), default=float("inf"))
                ms = _try(run, f"{provider.name} algorithm {algorithm} for {problem}", expected, best)
                if ms is not None:
                    right.append((ms, provider, algorithm))
        if not right:
            log.warning("sparse24: no provider multiplies %s right; masked dense matmuls serve", problem)
            right = [(float("inf"), _BY_NAME[MaskedDense.name], None)]
        last = sorted(right, key=lambda of: of[0])[:_LAST]
        runs = [partial(provider.run, problem, packed, x, algorithm) for _, provider, algorithm in last]
        *times, dense_ms = _in_turns([*runs, dense])
        sparse_ms, (_, provider, algorithm) = min(zip(times, last, strict=True), key=lambda of: of[0])
        return Choice(provider.name, algorithm, sparse_ms, dense_ms)


def _measure_fused(problem: Problem, kind: str, bias: torch.dtype | None, glu: Callable[..., Tensor]) -> Choice:
    """The fastest right variant with the activation behind it; KERNEL where the product and `glu` take less. Both
    results are compared with those of the two kernels. dense_ms: of the latter.
    """
    with torch.no_grad(), torch.cuda.device(problem.device):
        packed, x, _ = _data(problem)
        b = None if bias is None else torch.randn(problem.rows, device=problem.device).to(bias)

        def apart() -> Tensor:
            y = matmul(problem, packed, x)
            return torch.cat((y, glu(y, b, kind)), -1)

        def together(variant: int) -> Tensor:
            return torch.cat(gluon_matmul.multiply_glu(variant, packed, x, problem.rows, b, kind), -1)

        expected, best = apart(), float("inf")
        fastest = Choice(KERNEL)
        for variant in gluon_matmul.fusing(problem.device, problem.rows, kind):
            name = f"gluon algorithm {variant} with {kind} for {problem}"
            ms = _try(partial(together, variant), name, expected, best)
            if ms is not None and ms < best:
                best, fastest = ms, Choice(Gluon.name, variant)
        if fastest.algorithm is None:
            return fastest
        run = partial(gluon_matmul.multiply_glu, fastest.algorithm, packed, x, problem.rows, b, kind)
        ms, apart_ms = _in_turns([run, lambda: glu(matmul(problem, packed, x), b, kind)])
        return Choice(Gluon.name if ms < apart_ms else KERNEL, fastest.algorithm, ms, apart_ms)


def _data(problem: Problem) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """packed, x, and the dense product of the same numbers.

    The packed form is drawn and the dense matrix read from it: any bytes of two legal nibbles are the metadata of some
    mask, in each order, so nothing is sorted or packed, which would take longer than the matmuls, and gigabytes.
    """
    (direction, rows, inner, outer, dtype, device), order = problem, layout.metadata_order(problem.device)
    generator = torch.Generator(device).manual_seed(0)
    packed = layout.empty(rows, inner, dtype, device)
    values, metadata = layout.split(packed, rows, inner)
    values.normal_(generator=generator)
    legal = torch.tensor([low | high << 4 for low in layout.NIBBLES for high in layout.NIBBLES], dtype=torch.uint8)
    drawn = torch.randint(len(legal), metadata.shape, generator=generator, dtype=torch.int32, device=device)
    torch.index_select(legal.to(device), 0, drawn, out=metadata)
    a = torch.empty(rows, inner // 4, 4, dtype=dtype, device=device)
    c, lanes = (torch.arange(n, device=device) for n in (inner // 4, 4))
    by_rows = (torch.arange(rows, device=device), values.view(rows, -1, 2), a)
    for m, pairs, dense in zip(*(x.split(_ROWS) for x in by_rows), strict=True):
        byte, shift = layout.nibble_address(m[:, None], c, rows, inner, order)
        nibbles = ((metadata[byte] >> shift.to(torch.uint8)) & 15)[..., None]
        last = torch.where(nibbles >> 2 == lanes, pairs[..., 1:], 0)
        torch.where(nibbles & 3 == lanes, pairs[..., :1], last, out=dense)
    a = a.view(rows, inner)
    x_shape = (outer, inner) if direction == "spmm" else (inner, outer)
    x = torch.randn(x_shape, generator=generator, dtype=dtype, device=device)
    return packed, x, (lambda: x @ a.t()) if direction == "spmm" else (lambda: a @ x)


def _algorithms(provider: Provider, problem: Problem) -> list[int | None]:
    try:
        return list(provider.algorithms(problem))
    except RuntimeError as error:
        log.info("sparse24: %s does not serve %s: %s", provider.name, problem, error)
        return []


def _try(run: Callable[[], Tensor], name: str, expected: Tensor, best: float) -> float | None:
    """ms of a candidate, None where it errs, where its numbers are wrong in one of three runs, or where its first runs
    are a quarter slower than the `best` so far: those of a good one differ by less.
    """
    try:
        if time_ms(run, 2) > 1.25 * best:
            return None
        allowed = TOLERANCE * _norm(expected)
        for _ in range(3):
            if not _norm(run() - expected) < allowed:
                log.warning("sparse24: struck %s: wrong numbers", name)
                return None
        return time_ms(run, 5)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        log.error("sparse24: measuring %s failed for good", name)
        raise  # no memory, or an error after which this process cannot use the GPU
    except RuntimeError as error:
        log.info("sparse24: struck %s: %s", name, error)
        return None


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32)


def time_ms(run: Callable[[], object], repeats: int) -> float:
    """ms a call on the device, after one that does not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def _in_turns(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Medians of all, in ms, taken in turns, each turn in another order: at the power limit the clock follows the load,
    also that of what ran before.
    """
    times: list[list[float]] = [[] for _ in runs]
    repeats = [min(5, max(1, round(_TURN_MS / time_ms(run, 1)))) for run in runs]
    order, shuffle = list(range(len(runs))), random.Random(0).shuffle
    for _ in range(_TURNS):
        shuffle(order)
        for i in order:
            times[i].append(time_ms(runs[i], repeats[i]))
    return [median(of) for of in times]


# -------------------------------------------------------------------------------------------------------------- on disk


class _Store:
    """Choices of one GPU model, in memory and on disk."""

    def __init__(self, path: Path, header: dict[str, str]) -> None:
        self.path, self.header = path, header
        self.choices = self._read()

    def _read(self) -> dict[str, Choice]:
        try:
            saved = json.loads(self.path.read_text())
            if saved["header"] != self.header:
                raise ValueError(f"it is of {saved['header']}")
            choices = {key: Choice(**value) for key, value in saved["choices"].items()}
            if any(c.provider not in (KERNEL, *_BY_NAME) for c in choices.values()):
                raise ValueError("it names unknown providers")
            return choices
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("sparse24: ignored the cache of measured choices %s: %s", self.path, error)
            return {}

    def add(self, key: str, choice: Choice) -> None:
        """Keep a choice, beside those that other processes have kept since."""
        self.choices = {**self._read(), **self.choices, key: choice}
        text = json.dumps({"header": self.header, "choices": {k: asdict(c) for k, c in self.choices.items()}}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("sparse24: could not save measured choices to %s: %s", self.path, error)


def cache_folder() -> Path:
    return Path(os.environ.get("SPARSE24_CACHE") or Path.home() / ".cache" / "sparse24")


@lru_cache(maxsize=8)
def _store(device: torch.device) -> _Store:
    name = torch.cuda.get_device_name(device)
    header = {"gpu": name, "torch": torch.__version__, "cusparselt": cusparselt.version(), "format": "1"}
    slug = "".join(ch if ch.isalnum() else "-" for ch in f"{name}-{header['torch']}-{header['cusparselt']}")
    if gluon_matmul.asked_for():
        slug += "-gluon"  # measured among more candidates
        header["gluon"] = gluon_matmul.sources()
    return _Store(cache_folder() / f"{slug}.json", header)


def _key(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.direction} {problem.rows}x{problem.inner}x{problem.outer} {dtype}"
