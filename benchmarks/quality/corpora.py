"""What the quality runs learn from. Batches are functions of (seed, step) alone: a resumed run, and every arm, sees the
same ones.

Text         the Python sources installed on the machine, standard library and packages, split by package, without
             copies of a file; BPE learnt from the training part. Its hash is recorded: losses compare where it is the
             same.
Images       made up: a class is a fixed pattern, an image that pattern shifted cyclically by any offset under white
             noise, and some labels are drawn anew at random. The least loss and the best accuracy are known.
Translation  made up: runs of words between separators come out reversed, each word by the dictionary that the
             separator behind it names. The target is a function of the source, so that the least loss is 0.
"""

import hashlib
import math
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
HELD_OUT_SEED = 1 << 40  # of steps that no training run reaches
_LARGEST_FILE = 200_000


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Draws on a GPU are others than on a CPU; the runs to compare are on one of them."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (1 << 63))


# ----------------------------------------------------------------------------------------------------------------- text


def python_sources(limit: int) -> tuple[list[str], list[str]]:
    """(training, held-out) files, at most `limit` bytes of both together. One package in 20 is held out."""
    stdlib = sysconfig.get_path("stdlib")
    roots = [stdlib, *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))]
    parts: tuple[list[str], list[str]] = ([], [])
    seen, total = set[bytes](), 0
    for root in dict.fromkeys(roots):
        for package in sorted(os.listdir(root)):
            if package in ("site-packages", "dist-packages"):
                continue
            held_out = int.from_bytes(hashlib.sha256(package.encode()).digest()[:4], "big") % 20 == 0
            path = Path(root, package)
            for file in [path] if path.suffix == ".py" else sorted(path.rglob("*.py")):
                if not file.is_file() or file.stat().st_size > _LARGEST_FILE:
                    continue
                content = file.read_bytes()
                digest = hashlib.sha256(content).digest()
                try:
                    text = content.decode()
                except UnicodeDecodeError:
                    continue
                if digest not in seen:
                    seen.add(digest)
                    total += len(content)
                    parts[held_out].append(text)
                if total > limit:
                    break
            if total > limit and all(parts):
                return parts
    if not all(parts):
        raise SystemExit(f"found no Python sources for both parts in {', '.join(roots)}: a fuller Python is needed")
    return parts


def text_path(cache: Path, vocabulary: int, limit: int) -> Path:
    """Where the tokens of at most `limit` bytes are kept: read once, they stay the same whatever is installed later."""
    return cache / f"text_{limit}_{vocabulary}.pt"


def prepared(vocabulary: int, limit: int) -> dict[str, Any]:
    """{"train", "held_out": tokens int32 [n], "sha256": of the sources, "bytes_per_token": of the held-out part}."""
    parts = python_sources(limit)
    digest = hashlib.sha256()
    for part in parts:
        for text in part:
            digest.update(text.encode())
        digest.update(b"\0")
    tokens = tokenize(parts, vocabulary)
    bytes_per_token = sum(len(t.encode()) for t in parts[1]) / len(tokens["held_out"])
    return {**tokens, "sha256": digest.hexdigest(), "bytes_per_token": bytes_per_token}


class Text:
    """Tokens, int32 [n] each, of the training and the held-out part on `device`."""

    def __init__(self, cache: Path, vocabulary: int, limit: int, device: torch.device) -> None:
        path = text_path(cache, vocabulary, limit)
        if not path.exists():
            save_tensors(path, prepared(vocabulary, limit))
        state = torch.load(path, weights_only=True)
        self.vocabulary, self.sha256, self.bytes_per_token = vocabulary, state["sha256"], state["bytes_per_token"]
        self.train, self.held_out = state["train"].to(device), state["held_out"].to(device)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "Python sources",
            "sha256": self.sha256,
            "train_tokens": len(self.train),
            "held_out_tokens": len(self.held_out),
            "vocabulary": self.vocabulary,
            "bytes_per_token": self.bytes_per_token,
        }

    def windows(self, seed: int, step: int, batch: int, length: int) -> Tensor:
        """int64 [batch, length]. Steps from HELD_OUT_SEED on are of the held-out part."""
        source = self.held_out if step >= HELD_OUT_SEED else self.train
        if len(source) <= length:
            raise SystemExit(f"found {len(source)} tokens of text, need over {length}: raise --text-mb")
        device = source.device
        starts = torch.randint(len(source) - length, (batch,), generator=generator(seed, step, device), device=device)
        return source[starts[:, None] + torch.arange(length, device=device)].long()


def tokenize(parts: Sequence[Sequence[str]], vocabulary: int) -> dict[str, Tensor]:
    """Byte-level BPE, learnt from at most 50 MB of the training part."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def some() -> Iterator[str]:
        size = 0
        for text in parts[0]:
            size += len(text)
            if size > 50_000_000:
                return
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # the last id is left free: BERT's mask
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(some(), trainer)
    found = {}
    for name, part in zip(("train", "held_out"), parts, strict=True):
        ids: list[Tensor] = []
        for i in range(0, len(part), 256):
            ids += [torch.tensor(e.ids, dtype=torch.int32) for e in tokenizer.encode_batch(list(part[i : i + 256]))]
        found[name] = torch.cat(ids)
    return found


def save_tensors(path: Path, state: Any) -> None:
    """Written beside it and renamed: an interrupted write leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            torch.save(state, file)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def masked(tokens: Tensor, seed: int, step: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """BERT's task: (inputs, targets), targets IGNORE but for 15% of places, of which 80% are the mask (the last id),
    10% a random token, 10% as they were.
    """
    device = tokens.device
    g = generator(seed + 1, step, device)
    draw, what = torch.rand(2, *tokens.shape, generator=g, device=device)
    noise = torch.randint(vocabulary - 1, tokens.shape, generator=g, device=device)
    chosen = draw < 0.15
    replaced = torch.where(what < 0.8, vocabulary - 1, torch.where(what < 0.9, noise, tokens))
    return torch.where(chosen, replaced, tokens), torch.where(chosen, tokens, IGNORE)


# --------------------------------------------------------------------------------------------------------------- images


class Images:
    """classes patterns [3, size, size], shifted cyclically, under white noise of `sigma` times their own deviation."""

    def __init__(self, classes: int, size: int, device: torch.device, sigma: float = 1.0, flips: float = 0.1) -> None:
        self.classes, self.size, self.sigma, self.flips, self.device = classes, size, sigma, flips, device
        spectrum = torch.fft.rfft2(torch.randn(classes, 3, size, size, generator=generator(0, 0)))
        low = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size).square() < 0.25**2
        patterns = torch.fft.irfft2(spectrum * low, s=(size, size))
        self.patterns = (patterns / patterns.square().mean((1, 2, 3), keepdim=True).sqrt()).to(device)

    def batch(self, seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
        """Images fp32 [batch, 3, size, size] and labels int64 [batch]."""
        g, device = generator(seed, step, self.device), self.device
        classes = torch.randint(self.classes, (batch,), generator=g, device=device)
        dy, dx = torch.randint(self.size, (2, batch), generator=g, device=device)
        at = torch.arange(self.size, device=device)
        rows, cols = (at + dy[:, None]) % self.size, (at + dx[:, None]) % self.size
        channels = torch.arange(3, device=device)[:, None, None]
        clean = self.patterns[classes[:, None, None, None], channels, rows[:, None, :, None], cols[:, None, None, :]]
        images = clean + self.sigma * torch.randn(clean.shape, generator=g, device=device)
        anew = torch.rand(batch, generator=g, device=device) < self.flips
        drawn = torch.randint(self.classes, (batch,), generator=g, device=device)
        return images, torch.where(anew, drawn, classes)

    def describe(self) -> dict[str, Any]:
        """With the optimum: the true class is known to `confusion` (a union bound), the label from it as far as drawn.

        best_accuracy: of always saying the true class. least_loss: nats, of its exact label distribution.
        """
        right, wrong = 1 - self.flips + self.flips / self.classes, self.flips / self.classes
        least = -right * math.log(right) - ((self.classes - 1) * wrong * math.log(wrong) if wrong else 0.0)
        spectra = torch.fft.rfft2(self.patterns)
        closest = math.inf
        for c in range(self.classes - 1):  # the distance of the nearest two patterns under any shift
            products = torch.fft.irfft2((spectra[c] * spectra[c + 1 :].conj()).sum(1), s=(self.size, self.size))
            closest = min(closest, 2 * 3 * self.size**2 - 2 * products.max().item())
        apart = math.sqrt(max(closest, 0.0)) / (2 * self.sigma)
        others = (self.classes - 1) * self.size**2
        return {
            "name": "shifted patterns under noise (made up)",
            "classes": self.classes,
            "size": self.size,
            "best_accuracy": right,
            "least_loss": least,
            "confusion": float(f"{min(1.0, others * 0.5 * math.erfc(apart / math.sqrt(2))):.0e}"),  # alike on all GPUs
        }


# ---------------------------------------------------------------------------------------------------------- translation

SEPARATORS = 16
DICTIONARIES = 4  # of 16 a run learns nothing but frequencies for half its steps, and when it goes on is chance


class Translation:
    """Ids: 0 begins a target; 1 to SEPARATORS are separators; the rest are words."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.vocabulary, self.device = vocabulary, device
        g, first = generator(0, 1), 1 + SEPARATORS
        words = vocabulary - first
        self.dictionaries = torch.arange(vocabulary).repeat(DICTIONARIES, 1)
        for row in self.dictionaries:
            row[first:] = first + torch.randperm(words, generator=g)
        self.dictionaries = self.dictionaries.to(device)
        self.frequency = 1.0 / (10.0 + torch.arange(words, device=device))  # Zipf's law, but for the most frequent

    def batch(self, seed: int, step: int, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Source, target inputs (shifted by one) and targets: int64 [batch, length] each."""
        g, device, shape = generator(seed, step, self.device), self.device, (batch, length)
        words = torch.multinomial(self.frequency, batch * length, replacement=True, generator=g).view(shape)
        separators = torch.randint(1, 1 + SEPARATORS, shape, generator=g, device=device)
        is_separator = torch.rand(shape, generator=g, device=device) < 0.2
        is_separator[:, -1] = True
        source = torch.where(is_separator, separators, words + 1 + SEPARATORS)
        target = self.translate(source)
        begun = torch.cat((torch.zeros_like(target[:, :1]), target[:, :-1]), 1)
        return source, begun, target

    def translate(self, source: Tensor) -> Tensor:
        """int64 [batch, length], each row ending in a separator."""
        length = source.shape[1]
        at = torch.arange(length, device=source.device).expand_as(source)
        is_separator = (source >= 1) & (source <= SEPARATORS)
        end = torch.where(is_separator, at, length).flip(1).cummin(1).values.flip(1)  # of the separator behind
        last = torch.where(is_separator, at, -1).cummax(1).values
        begin = torch.where(is_separator, at, last + 1)
        mirrored = torch.where(is_separator, at, begin + end - 1 - at)
        dictionary = source.gather(1, end) % DICTIONARIES
        return self.dictionaries[dictionary, source.gather(1, mirrored)]

    def describe(self) -> dict[str, Any]:
        name = "reversed phrases by dictionaries (made up)"
        return {"name": name, "vocabulary": self.vocabulary, "best_accuracy": 1.0, "least_loss": 0.0}
