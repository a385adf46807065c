"""The method around the optimizer step: when masks move, what the decay adds, what a skipped step leaves alone."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24.kernels.reference import best_mask

from .models import MLP, Stack, SwiGLU, compiled, loss_and_grads, masked_twin, relative, sparse_names, train


def weights_of(model: nn.Module) -> dict[str, sparse24.SparseWeight]:
    return {n: w for n, w in sparse24.session(model).weights.items() if w.reason_skipped is None}


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: w.mask() for n, w in weights_of(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def is_current(weight: sparse24.SparseWeight) -> bool:
    """Whether the packed forms hold the masked master as it is now."""
    from sparse24.kernels import layout

    for operand in weight.operands.values():
        row, col, rows, cols = operand.where(weight)
        block = (slice(row, row + weight.shape[0]), slice(col, col + weight.shape[1]))
        dense = layout.unpack(operand.packed, rows, cols, "sm_90")[block]
        across = layout.unpack(operand.packed_t, cols, rows, "sm_90").t()[block]
        expected = weight.masked().to(dense.dtype)
        if not (torch.equal(dense, expected) and torch.equal(across, expected)):
            return False
    return bool(weight.operands)


def test_masks_move_every_refresh_and_values_every_step() -> None:
    from sparse24.kernels.reference import best_mask

    model = Stack(MLP(), SwiGLU())
    run, session = compiled(model, refresh_every=3), sparse24.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    run(torch.randn(2, 64))
    before = masks_of(model)
    for step in range(1, 8):
        train(run, optimizer, 1, seed=step)
        now = masks_of(model)
        assert all(is_current(w) for w in weights_of(model).values())
        if step % 3:
            assert same(before, now), step
        else:
            assert not same(before, now), step
            assert all(torch.equal(now[n], best_mask(w.param)) for n, w in weights_of(model).items())
            flips = sum(int((before[n] ^ now[n]).sum()) for n in now)
            assert session.flip_rate() == flips / sum(m.numel() for m in now.values()) > 0
        before = now
        assert session.step == step


def test_first_mask_counts_no_flips() -> None:
    model = Stack(MLP())
    run, session = compiled(model, refresh_every=2), sparse24.session(model)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    assert session.flip_rate() == 0.0


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_decay_enters_after_clipping_once_per_step(clip: float | None) -> None:
    """With plain SGD the update is lr * (clipped gradient + decay * (1 - M) * W), however many micro-steps there
    were.
    """
    model, decay, lr = Stack(MLP()), 0.5, 0.1
    run = compiled(model, decay=decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(3):
        run(torch.randn(4, 64)).square().mean().backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    expected = {}
    for name, p in model.named_parameters():
        g = p.grad.clone()
        weight = weights_of(model).get(name)
        if weight is not None:
            g += decay * ~weight.mask() * p.detach()
        expected[name] = p.detach() - lr * g
    optimizer.step()
    assert sparse24.session(model).step == 1
    for name, p in model.named_parameters():
        assert relative(p, expected[name]) < 1e-6, name


def test_decay_on_weight() -> None:
    model, decay, lr = Stack(MLP()), 0.5, 0.1
    run = compiled(model, decay=decay, decay_on="weight")
    run(torch.randn(4, 64)).square().mean().backward()
    weight, p = weights_of(model)["blocks.0.up.weight"], model.blocks[0].up.weight
    expected = p.detach() * torch.where(weight.mask(), 1.0, 1 - lr * decay) - lr * p.grad
    torch.optim.SGD(model.parameters(), lr=lr).step()
    assert relative(p, expected) < 1e-6


def test_masks_are_first_searched_after_a_dense_start() -> None:
    """The same as `to_dense` before the first forward and `to_sparse` later; without decay while dense."""
    found = []
    for options in ({"sparse_after": 3}, {}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack(MLP(), SwiGLU())
        run = compiled(model, decay=0.5, refresh_every=2, dense_after=6, **options)
        session, optimizer = sparse24.session(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
        if not options:
            session.to_dense()
        phases, losses = [], []
        for step in range(8):
            phases.append(session.phase)
            losses += train(run, optimizer, 1, seed=step)
            if step == 2:
                if not options:
                    session.to_sparse()
                run(torch.randn(4, 64))
                for weight in weights_of(model).values():
                    assert torch.equal(weight.mask(), best_mask(weight.param.detach()))
        assert phases[1:] == ["dense"] * 2 + ["sparse"] * 3 + ["dense"] * 2
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))
    twin, x = Stack(MLP()), torch.randn(4, 64)
    assert relative(compiled(twin, sparse_after=1)(x), copy.deepcopy(twin)(x)) < 1e-6
    never = compiled(Stack(MLP()), sparse_after=1, dense_after=0)
    assert train(never, torch.optim.SGD(never.parameters(), lr=1e-2), 3) and sparse24.session(never).phase == "dense"


@pytest.mark.parametrize("after", [{"sparse_after": -1}, {"sparse_after": 1.5}, {"sparse_after": 4, "dense_after": 4}])
def test_a_dense_start_ends_before_the_dense_end(after: dict[str, object]) -> None:
    with pytest.raises(sparse24.OptionError, match="option sparse_after="):
        sparse24.Recipe(**after)


def test_closures_are_decayed_after_their_backward() -> None:
    model, decay, lr = Stack(MLP()), 0.5, 0.1
    run, x = compiled(model, decay=decay), torch.randn(4, 64)
    loss_and_grads(run, model, x)
    weight, p = weights_of(model)["blocks.0.up.weight"], model.blocks[0].up.weight
    expected = p.detach() - lr * (p.grad + decay * ~weight.mask() * p.detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = run(x).float().square().mean()
        loss.backward()
        return loss

    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        start = copy.deepcopy(model.state_dict())
        assert call() is not None
        assert relative(p, expected) < 1e-6
        model.load_state_dict(start)
    assert sparse24.session(model).step == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool) -> None:
    model, decay = Stack(MLP()), 0.5
    run, session = compiled(model, decay=decay, refresh_every=1), sparse24.session(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(poison: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(run(torch.ones(4, 64)).square().mean()).backward()
        if poison:
            model.blocks[0].up.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    step(poison=False)
    assert session.step == 1
    masks, params = masks_of(model), copy.deepcopy(model.state_dict())
    step(poison=True)
    assert session.step == 1
    assert same(masks, masks_of(model)) and same(params, model.state_dict())
    step(poison=False)
    assert session.step == 2


@pytest.mark.parametrize("unscale", [False, True])
def test_decay_is_scaled_where_a_fused_optimizer_unscales_inside(unscale: bool) -> None:
    model, decay, lr = Stack(MLP()), 0.5, 0.1
    run, x = compiled(model, decay=decay), torch.ones(4, 64)
    loss_and_grads(run, model, x)
    weight, p = weights_of(model)["blocks.0.up.weight"], model.blocks[0].up.weight
    expected = p.detach() - lr * (p.grad + decay * ~weight.mask() * p.detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(run(x).float().square().mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert relative(p, expected) < 1e-5


def test_fp16_autocast_with_a_scaler_trains() -> None:
    model = Stack(SwiGLU())
    run, session = compiled(model, wgrad="mvue", refresh_every=2), sparse24.session(model)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu")
    losses, x = [], torch.randn(32, 64)
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = run(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < session.step <= 12


def test_tied_and_shared_weights_stay_dense_and_are_not_decayed() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.tied = MLP(), MLP()
            self.embedding = nn.Embedding(128, 64)
            self.tied.up.weight = self.embedding.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            x = self.embedding(i)
            return self.tied(self.block(self.block(x)))

    model, lr = Shared(), 0.1
    run = compiled(model, decay=0.5)
    i = torch.arange(8)
    run(i).square().mean().backward()
    assert sparse_names(model) == ["tied.down.weight"]
    reasons = {n: w.reason_skipped for n, w in sparse24.session(model).weights.items() if w.reason_skipped}
    assert "used 2 times" in reasons["block.up.weight"] and "used 2 times" in reasons["tied.up.weight"]
    expected = {n: p.detach() - lr * p.grad for n, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=lr).step()
    for name, p in model.named_parameters():
        assert (relative(p, expected[name]) < 1e-6) == (name != "tied.down.weight"), name


def test_accumulation_counts_optimizer_steps_and_draws_anew_each_micro_step() -> None:
    model, x = Stack(MLP()), torch.randn(64, 64)
    run, session = compiled(model, wgrad="mvue", refresh_every=2), sparse24.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 4):
        optimizer.zero_grad()
        seen = []
        for _ in range(3):
            before = model.blocks[0].up.weight.grad
            before = 0 if before is None else before.clone()
            run(x).square().mean().backward()
            seen.append(model.blocks[0].up.weight.grad - before)
        assert not torch.allclose(seen[0], seen[1], rtol=1e-2) and not torch.allclose(seen[1], seen[2], rtol=1e-2)
        optimizer.step()
        assert session.step == step


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_activation_checkpointing(reentrant: bool, inside: bool) -> None:
    """Recomputing the forward refreshes nothing and changes no number, inside the compiled model and around it."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant) if inside else self.block(x)

    model = Checkpointed()
    torch_compiled = compiled(model, fullgraph=False, refresh_every=1, inner="aot_eager")

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch_compiled(x) if inside else checkpoint(torch_compiled, x, use_reentrant=reentrant)

    loss_and_grads(run, model, torch.randn(4, 64))
    assert sparse_names(model) == ["block.up.weight", "block.down.weight"]
    masks, x = masks_of(model), torch.randn(4, 64)
    twin = masked_twin(model)
    _, grads = loss_and_grads(run, model, x)
    _, expected = loss_and_grads(twin, twin, x)
    assert all(relative(grads[n], expected[n]) < 1e-5 for n in expected)
    assert same(masks, masks_of(model)) and sparse24.session(model).step == 0
    torch.optim.AdamW(model.parameters(), lr=1e-1).step()
    assert not same(masks, masks_of(model)) and sparse24.session(model).step == 1


def test_evaluation_in_between_changes_nothing() -> None:
    def run_once(evaluate: bool) -> list[float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack(MLP(act=lambda x: nn.functional.dropout(torch.relu(x), 0.1, training=True)))
        run = compiled(model, wgrad="mvue", refresh_every=2)
        for w in sparse24.session(model).weights.values():
            w.layer = 0
        run(torch.zeros(1, 64))
        for i, w in enumerate(weights_of(model).values()):
            w.layer, w.calls = i, 0
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for step in range(5):
            losses += train(run, optimizer, 1, seed=step)
            if evaluate:
                state = torch.get_rng_state()
                model.eval()
                with torch.no_grad():
                    run(torch.randn(3, 64))
                model.train()
                torch.set_rng_state(state)
        return losses

    assert run_once(True) == run_once(False)


def test_two_models_with_two_recipes() -> None:
    a, b = Stack(MLP()), Stack(MLP())
    run_a, run_b = compiled(a, refresh_every=1, decay=0.0), compiled(b, refresh_every=3, dense_after=4)
    oa, ob = (torch.optim.AdamW(m.parameters(), lr=1e-1) for m in (a, b))
    run_a(torch.randn(1, 64)), run_b(torch.randn(1, 64))
    start_a, start_b = masks_of(a), masks_of(b)
    train(run_a, oa, 2)
    train(run_b, ob, 2)
    assert not same(start_a, masks_of(a)) and same(start_b, masks_of(b))
    train(run_b, ob, 2)
    assert sparse24.session(b).phase == "dense" and sparse24.session(a).phase == "sparse"
    assert (sparse24.session(a).step, sparse24.session(b).step) == (2, 4)


def test_dense_phase_is_the_dense_model_with_the_same_optimizer() -> None:
    model, x = Stack(MLP(), SwiGLU()), torch.randn(4, 16, 64)
    run, session = compiled(model, dense_after=2, decay=0.5), sparse24.session(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(run, optimizer, 2)
    assert session.phase == "dense" and session.memory()["packed"] == 0
    twin = copy.deepcopy(model)
    loss, grads = loss_and_grads(run, model, x)
    expected, expected_grads = loss_and_grads(twin, twin, x)
    assert relative(loss, expected) < 1e-6
    assert all(relative(grads[n], expected_grads[n]) < 1e-5 for n in expected_grads)
    update = {n: p.detach() - 1e-2 * p.grad for n, p in model.named_parameters()}
    optimizer.step()
    assert all(relative(p, update[n]) < 1e-6 for n, p in model.named_parameters())


def test_to_dense_and_back() -> None:
    model, x = Stack(SwiGLU()), torch.randn(4, 64)
    run, session = compiled(model), sparse24.session(model)
    sparse, masks = run(x), masks_of(model)
    session.to_dense()
    assert session.phase == "dense" and same(masks, masks_of(model))  # the last masks are kept
    assert relative(run(x), copy.deepcopy(model)(x)) < 1e-6
    session.to_sparse()
    assert session.phase == "sparse"
    assert relative(run(x), sparse) < 1e-6


def test_phase_may_be_set_before_the_first_forward() -> None:
    model, x = Stack(SwiGLU()), torch.randn(4, 64)
    run = compiled(model)
    sparse24.session(run).to_dense()
    assert relative(run(x), copy.deepcopy(model)(x)) < 1e-6
    assert sparse24.session(model).phase == "dense" and len(sparse_names(model)) == 3


def test_frozen_midway_keeps_its_mask_and_does_not_advance() -> None:
    model = Stack(MLP(), MLP())
    run, session = compiled(model, refresh_every=1), sparse24.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    train(run, optimizer, 2)
    frozen = model.blocks[0].up.weight.requires_grad_(False)
    frozen.grad = None
    mask = session.weights["blocks.0.up.weight"].mask()
    train(run, optimizer, 2)
    weight = session.weights["blocks.0.up.weight"]
    assert weight.sparse and weight.step == 2 and torch.equal(weight.mask(), mask)
    assert session.weights["blocks.0.down.weight"].step == 4


def test_frozen_from_the_start_stays_dense() -> None:
    model = Stack(MLP())
    model.blocks[0].up.weight.requires_grad_(False)
    compiled(model)(torch.randn(2, 64))
    assert sparse_names(model) == ["blocks.0.down.weight"]
    assert "frozen" in sparse24.session(model).weights["blocks.0.up.weight"].reason_skipped


def test_weights_changed_by_hand_are_followed() -> None:
    """A loaded checkpoint: before the first step its own mask; later the mask in force, until the next refresh."""
    from sparse24.kernels.reference import best_mask

    model, other = Stack(MLP()), Stack(MLP())
    run, x = compiled(model), torch.randn(4, 64)
    run(x)
    model.load_state_dict(other.state_dict())
    assert relative(run(x), masked_twin(model)(x)) < 1e-6
    assert torch.equal(masks_of(model)["blocks.0.up.weight"], best_mask(other.blocks[0].up.weight))
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    masks = masks_of(model)
    model.load_state_dict(Stack(MLP()).state_dict())
    assert relative(run(x), masked_twin(model)(x)) < 1e-6
    assert same(masks, masks_of(model))


@pytest.mark.parametrize("refresh_every", [1, 40])
def test_nan_weights_raise_at_the_step_where_they_appear(refresh_every: int) -> None:
    model = Stack(MLP())
    run = compiled(model, refresh_every=refresh_every)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(run, optimizer, 3)
    run(torch.randn(2, 64)).square().mean().backward()
    model.blocks[0].down.weight.grad[3, 5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.down\.weight has 1 NaN .* after optimizer step 4"):
        optimizer.step()


def test_nan_weights_raise_before_the_first_mask() -> None:
    model = Stack(MLP())
    model.blocks[0].up.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.up\.weight"):
        compiled(model)(torch.randn(2, 64))


@pytest.mark.parametrize(
    ("make", "warned"),
    [
        (lambda p: torch.optim.AdamW(p, foreach=True), False),
        (lambda p: torch.optim.AdamW(p, fused=True), False),
        (lambda p: torch.optim.RMSprop(p), False),
        (lambda p: torch.optim.Adafactor(p), False),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), True),
    ],
)
def test_optimizers_without_second_moments_get_a_warning(make, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Stack(MLP())
    run = compiled(model, refresh_every=2)
    before = None
    optimizer = make(model.parameters())
    train(run, optimizer, 1)
    before = masks_of(model)
    train(run, optimizer, 1)
    assert sparse24.session(model).step == 2 and before is not None
    assert any("without second moments" in r.getMessage() for r in caplog.records) == warned


def test_an_optimizer_of_the_users_own() -> None:
    class Signed(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure=None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.add_(p.grad.sign(), alpha=-group["lr"])  # .data: the version counter does not see it

    model = Stack(MLP())
    run = compiled(model, refresh_every=2)
    train(run, Signed(model.parameters()), 3)
    assert sparse24.session(model).step == 3
    assert all(is_current(w) for w in weights_of(model).values())
