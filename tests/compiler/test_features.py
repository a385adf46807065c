"""Training loops as people write them: copies, changing lengths, every way to compile, every way to save."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparse24

from .models import GPT2MLP, MLP, Stack, SwiGLU, compiled, masked_twin, relative, sparse_names, train

OPTIONS = {"inner": "eager", "wgrad": "dense"}


@pytest.fixture
def graphs() -> Iterator[Any]:
    """How many graphs were compiled since the test began."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    yield lambda: stats["unique_graphs"] - before


# ------------------------------------------------------------------------------------------------ changing lengths


class Decoder(nn.Module):
    """Attention over however many tokens there are, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(64, 192), nn.Linear(64, 64), SwiGLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.mlp(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_changing_lengths_and_a_short_last_batch_compile_at_most_three_graphs(
    dynamic: bool | None, inner: str, graphs: Any
) -> None:
    """Static, one dimension dynamic, both dynamic: what torch.compile does for a dense model, and no graph more."""
    model = Stack(Decoder(), Decoder())
    options = {**OPTIONS, "inner": inner, "refresh_every": 2, "dense_after": 12}
    run = torch.compile(model, backend="sparse24", options=options, fullgraph=True, dynamic=dynamic)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lengths = [16, 16, 24, 8, 31, 17, 40, 5]
    for epoch in range(2):
        for i, length in enumerate(lengths):
            x = torch.randn(2 if i == len(lengths) - 1 else 4, length, 64)  # the last batch is short
            if epoch == 0:
                run(x)
                assert relative(run(x), masked_twin(model)(x)) < 1e-5
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    assert sparse24.session(model).step >= 12 and sparse24.session(model).phase == "dense"
    ours = graphs()
    torch._dynamo.reset()
    twin, before = copy.deepcopy(model), graphs()
    plain = torch.compile(twin, backend=inner, fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        for i, length in enumerate(lengths):
            plain(torch.randn(2 if i == len(lengths) - 1 else 4, length, 64)).square().mean().backward()
    assert ours == graphs() - before <= 3


def test_a_short_last_batch_alone_compiles_once_more(graphs: Any) -> None:
    model = Stack(MLP(), SwiGLU())
    run = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        for batch in (8, 8, 3):
            optimizer.zero_grad()
            run(torch.randn(batch, 16, 64)).square().mean().backward()
            optimizer.step()
    assert graphs() == 2 and sparse24.session(model).step == 9


def test_steps_refreshes_and_the_end_of_the_sparse_phase_recompile_nothing(graphs: Any) -> None:
    model = Stack(MLP())
    run = compiled(model, refresh_every=2, dense_after=6)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-3), 10)
    sparse24.session(model).to_sparse()
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-3), 2)
    assert graphs() == 1


# ------------------------------------------------------------------------------------------------ ways to compile


def test_a_whole_training_step_function() -> None:
    """Forward, backward and optimizer step in one compiled function: Dynamo leaves the last two to Python."""
    model, x = Stack(MLP(), SwiGLU()), torch.randn(4, 16, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    @torch.compile(backend="sparse24", options={**OPTIONS, "refresh_every": 2})
    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [step(x).item() for _ in range(6)]
    assert len(sparse_names(model)) == 5 and sparse24.session(model).step == 6
    assert losses[-1] < losses[0] and sparse24.session(model).flip_rate() > 0


def test_set_stance() -> None:
    """force_eager runs the dense model as it is; back in the default stance the masks are those of before."""
    model, x = Stack(MLP()), torch.randn(4, 64)
    run = compiled(model)
    sparse = run(x)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(run(x), model(x)) and relative(run(x), sparse) > 1e-3
    assert torch.equal(run(x), sparse)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(run, torch.optim.AdamW(model.parameters(), lr=1e-3), 0)
        assert torch.equal(run(x), sparse)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="this torch has no set_default_backend")
def test_set_default_backend() -> None:
    model, x = Stack(MLP()), torch.randn(4, 64)
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("sparse24")
    try:
        y = torch.compile(model, options={**OPTIONS})(x)
        assert len(sparse_names(model)) == 2 and relative(y, masked_twin(model)(x)) < 1e-5
    finally:
        torch.compiler.set_default_backend(before)


def test_every_way_to_compile_gives_the_same_numbers() -> None:
    x = torch.randn(4, 16, 64)

    def build() -> nn.Module:
        torch._dynamo.reset()
        torch.manual_seed(0)
        return Stack(SwiGLU(), MLP())

    def whole(model: nn.Module) -> Any:
        return torch.compile(model, backend="sparse24", options=OPTIONS)

    def method(model: nn.Module) -> Any:
        model.compile(backend="sparse24", options=OPTIONS)
        return model

    def regional(model: nn.Module) -> Any:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend="sparse24", options=OPTIONS)
        return model

    def function(model: nn.Module) -> Any:
        return torch.compile(lambda x: model(x), backend="sparse24", options=OPTIONS)

    losses = {}
    for way in (whole, method, regional, function):
        model = build()
        losses[way.__name__] = train(way(model), torch.optim.AdamW(model.parameters(), lr=1e-2), 3)
        assert len(sparse_names(model)) == 5 and sparse24.session(model).step == 3
    x = torch.tensor(list(losses.values()))
    assert (x - x[0]).abs().max() <= 1e-6 * x.abs().max(), losses


# ------------------------------------------------------------------------------------------------ copies and saving


def test_an_average_of_the_weights_is_dense_and_trains_nothing() -> None:
    model, x = Stack(MLP()), torch.randn(4, 64)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    run = compiled(model, refresh_every=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(3):
        train(run, optimizer, 1, seed=step)
        ema.update_parameters(model)
        for name, p in model.named_parameters():
            expected[name] = p.detach().clone() if step == 0 else 0.5 * expected[name] + 0.5 * p.detach()
    for name, p in ema.module.named_parameters():
        assert relative(p, expected[name]) < 1e-6
    assert sparse24.session(ema.module).weights == {} and sparse24.session(model).step == 3
    y = compiled(ema.module)(x)  # evaluated as sparse: masks of its own weights
    assert relative(y, masked_twin(ema.module)(x)) < 1e-6
    from sparse24.kernels.reference import best_mask

    average = ema.module.blocks[0].up.weight
    assert torch.equal(sparse24.session(ema.module).weights["blocks.0.up.weight"].mask(), best_mask(average))


@pytest.mark.parametrize("after", [0, 2])
def test_copies_and_pickles_of_a_model_in_training(after: int) -> None:
    """Of the module and of its compiled form; the copies are ordinary models, and the run goes on as without them."""

    def go(copying: bool) -> list[float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack(MLP(), SwiGLU())
        run = compiled(model, refresh_every=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = train(run, optimizer, after)
        if copying:
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(run)._orig_mod):
                assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
                assert sparse24.session(other).weights == {}
                assert type(other.blocks[0].up.weight) is nn.Parameter
                train(compiled(other), torch.optim.SGD(other.parameters(), lr=1e-2), 1)
        return losses + train(run, optimizer, 4, seed=1)

    assert go(True) == go(False)


def save_torch(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    torch.save(model.state_dict(), path / "model.pt")
    return torch.load(path / "model.pt", weights_only=True)


def save_safetensors(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, str(path / "model.safetensors"))
    return safetensors.load_file(path / "model.safetensors")


def save_distributed(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    dcp.save(get_model_state_dict(model), checkpoint_id=str(path), no_dist=True)
    state = {name: torch.full_like(t, 7.0) for name, t in model.state_dict().items()}
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state


@pytest.mark.parametrize("save", [save_torch, save_safetensors, save_distributed])
def test_checkpoints_have_the_keys_of_the_dense_model(save: Any, tmp_path: Path) -> None:
    model = Stack(GPT2MLP(), SwiGLU())
    dense = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    run = compiled(model, refresh_every=1)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    state = save(model, tmp_path)
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == dense
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())
    other, x = Stack(GPT2MLP(), SwiGLU()), torch.randn(4, 64)
    other.load_state_dict(state)
    sparse24.session(other).load_state_dict(sparse24.session(model).state_dict())
    assert torch.equal(compiled(other, refresh_every=1)(x), run(x))


def test_a_session_goes_through_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model, x = Stack(MLP()), torch.randn(4, 64)
    run = compiled(model, refresh_every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    train(run, optimizer, 3)
    dcp.save({"model": model.state_dict(), "session": sparse24.session(model)}, checkpoint_id=tmp_path, no_dist=True)
    other = Stack(MLP())
    again = compiled(other, refresh_every=2)
    again(x)  # dcp loads into what is there: the session must know its weights
    dcp.load({"model": other.state_dict(), "session": sparse24.session(other)}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(again(x), run(x)) and sparse24.session(other).step == 3


def test_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    model = transformers.GPT2Model(config)
    ids = torch.arange(16).view(1, 16)
    run = torch.compile(model, backend="sparse24", options={**OPTIONS, "refresh_every": 1})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        run(ids).last_hidden_state[..., 0].square().mean().backward()
        optimizer.step()
    assert len(sparse_names(model)) == 2
    model.save_pretrained(tmp_path)
    other = transformers.GPT2Model.from_pretrained(tmp_path)
    mine, loaded = model.state_dict(), other.state_dict()
    assert mine.keys() == loaded.keys() and all(torch.equal(mine[n], loaded[n]) for n in mine)
