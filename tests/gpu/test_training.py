"""Training on a GPU through the backend: sparse tensor cores against eager models with masked weights."""

import pytest
import torch

import sparse24

from ..compiler.models import GPT2MLP, MLP, Stack, SwiGLU, loss_and_grads, masked_twin, relative, sparse_names

pytestmark = pytest.mark.gpu
D = 256
BLOCKS = {
    "gelu": lambda: MLP(D, 4 * D),
    "swiglu": lambda: SwiGLU(D, 704),
    "swiglu_bias": lambda: SwiGLU(D, 704, bias=True),
    "gpt2_conv1d": lambda: GPT2MLP(D, 4 * D),
}


def under_autocast(module, dtype):
    def run(x):
        with torch.autocast("cuda", dtype=dtype):
            return module(x)

    return run


def compiled(model, **options):
    return torch.compile(
        model, backend="sparse24", options={"when": "always", "wgrad": "dense", **options}, fullgraph=True
    )


@pytest.mark.parametrize(
    ("inner", "dtype", "tokens"),
    [
        ("eager", torch.bfloat16, 256),
        ("eager", torch.bfloat16, 77),
        ("eager", torch.float16, 256),
        ("eager", torch.float16, 77),
        ("inductor", torch.bfloat16, 256),  # compiling takes most of the time: one dtype, one shape
    ],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_masked_eager(block: str, inner: str, dtype: torch.dtype, tokens: int) -> None:
    """No further from float64 than eager autocast with masked weights is, times a small factor."""
    model = Stack(BLOCKS[block](), BLOCKS[block](), d=D).cuda()
    x = torch.randn(2, tokens, D, device="cuda")
    run = under_autocast(compiled(model, inner=inner), dtype)
    run(x)
    twin = masked_twin(model)
    loss, grads = loss_and_grads(run, model, x)
    eager_loss, eager = loss_and_grads(under_autocast(twin, dtype), twin, x)
    wide = twin.double()
    truth_loss, truth = loss_and_grads(wide, wide, x.double())
    assert relative(loss, truth_loss) < 2 * relative(eager_loss, truth_loss) + 2e-3
    assert len(sparse_names(model)) == (6 if "swiglu" in block else 4)
    for name, grad in grads.items():
        assert relative(grad, truth[name]) < 2 * relative(eager[name], truth[name]) + 2e-3, name


def test_mvue_is_unbiased() -> None:
    model, x = Stack(MLP(D, 1024), SwiGLU(D, 704), d=D).cuda().bfloat16(), torch.randn(512, D, device="cuda").bfloat16()
    _, exact = loss_and_grads(compiled(model), model, x)
    torch._dynamo.reset()
    run = compiled(model, wgrad="mvue")
    draws = [loss_and_grads(run, model, x)[1] for _ in range(64)]
    for name in sparse_names(model):
        mean = torch.stack([d[name].double() for d in draws]).mean(0)
        one = relative(draws[0][name], exact[name])
        assert 0.05 < one < 1.5, name
        assert relative(mean, exact[name]) < 1.5 * one / 8 + 4e-3, name


def test_float32_stays_dense_unless_told_otherwise() -> None:
    model, x = Stack(MLP(D, 1024), d=D).cuda(), torch.randn(64, D, device="cuda")
    torch.compile(model, backend="sparse24", options={"inner": "eager"})(x)
    assert "float32" in sparse24.session(model).weights["blocks.0.up.weight"].reason_skipped
    torch._dynamo.reset()
    run = compiled(model, inner="eager")
    assert relative(run(x), masked_twin(model)(x)) < 1e-3
    assert len(sparse_names(model)) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_with_everything(fused: bool) -> None:
    """Accumulation, clipping, scaler, refreshes, dense phase; the same masks as a search on the CPU finds."""
    from sparse24.kernels.reference import best_mask

    model = Stack(MLP(D, 1024), SwiGLU(D, 704), d=D).cuda()
    run = under_autocast(compiled(model, wgrad="mvue", refresh_every=4, dense_after=10, decay=1e-3), torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
    scaler, session = torch.amp.GradScaler("cuda", init_scale=256.0), sparse24.session(model)
    x, losses, rates = torch.randn(128, D, device="cuda"), [], []
    for _ in range(14):
        optimizer.zero_grad()
        for half in x.chunk(2):
            loss = run(half).float().square().mean()
            scaler.scale(loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        rates.append(session.flip_rate())
        if session.step == 8:
            for name in sparse_names(model):
                weight = session.weights[name]
                assert torch.equal(weight.mask().cpu(), best_mask(weight.param.cpu())), name
    assert losses[-1] < 0.5 * losses[0]
    assert session.phase == "dense" and max(rates) > 0
    assert session.memory()["packed"] == 0


def test_nan_weights_are_named_one_step_later_at_the_latest() -> None:
    model = Stack(MLP(D, 1024), d=D).cuda().bfloat16()
    run, x = compiled(model, inner="eager"), torch.randn(64, D, device="cuda").bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.down\.weight .* after optimizer step 3"):
        for step in range(1, 5):
            optimizer.zero_grad()
            run(x).float().square().mean().backward()
            if step == 3:
                model.blocks[0].down.weight.grad[3, 5] = float("nan")
            optimizer.step()


def test_state_moves_between_cpu_and_gpu() -> None:
    model = Stack(SwiGLU(D, 704), d=D)
    options = {"inner": "eager", "when": "always", "wgrad": "dense"}
    torch.compile(model, backend="sparse24", options=options)(torch.randn(4, D))
    state = sparse24.session(model).state_dict()
    torch._dynamo.reset()
    other = Stack(SwiGLU(D, 704), d=D).cuda()
    other.load_state_dict(model.state_dict())
    sparse24.session(other).load_state_dict(state)
    run = under_autocast(torch.compile(other, backend="sparse24", options=options), torch.bfloat16)
    run(torch.randn(4, D, device="cuda"))
    for name in sparse_names(other):
        assert torch.equal(
            sparse24.session(other).weights[name].mask().cpu(), sparse24.session(model).weights[name].mask()
        )


def test_model_moved_to_the_gpu_mid_run_keeps_its_masks() -> None:
    model = Stack(SwiGLU(D, 704), d=D).bfloat16()
    run = compiled(model, inner="eager")
    run(torch.randn(4, D).bfloat16())
    masks = {n: sparse24.session(model).weights[n].mask() for n in sparse_names(model)}
    model.cuda()
    x = torch.randn(4, D, device="cuda").bfloat16()
    y = run(x)
    assert all(torch.equal(sparse24.session(model).weights[n].mask().cpu(), masks[n]) for n in masks)
    assert relative(y, masked_twin(model)(x)) < 2e-2


def test_cuda_graphs_give_the_losses_of_a_run_without_them() -> None:
    """Packed operands keep their addresses from step to step; refreshes and the dense phase are seen by the graphs."""

    def losses(graphs: bool) -> list[float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack(MLP(D, 1024), SwiGLU(D, 704), d=D).cuda().bfloat16()
        options = {"when": "always", "wgrad": "dense", "refresh_every": 3, "dense_after": 8}
        options["inductor"] = {"triton.cudagraphs": graphs}
        run = torch.compile(model, backend="sparse24", options=options, fullgraph=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        data, found = torch.Generator().manual_seed(1), []
        for _ in range(12):
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(256, D, generator=data).cuda().bfloat16()
            loss = run(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert sparse24.session(model).phase == "dense"
        return found

    with_graphs, without = losses(True), losses(False)
    assert with_graphs == pytest.approx(without, rel=2e-2)
    assert with_graphs[-1] < 0.8 * with_graphs[0]


def test_reduce_overhead_trains_sparse_in_cuda_graphs(monkeypatch) -> None:
    """mode= goes to Inductor: graphs are recorded and none is skipped; operands are inputs that stay in place."""
    from torch._dynamo.utils import counters

    from sparse24.compiler import decide
    from sparse24.kernels.gain import Gain

    monkeypatch.setattr(decide, "gain", lambda *args: Gain(1.0, 2.0, "mvue"))  # these layers are too small to gain
    counters.clear()
    model = Stack(MLP(D, 1024), SwiGLU(D, 704), d=D).cuda().bfloat16()
    run = torch.compile(model, backend="sparse24", mode="reduce-overhead", fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    x = torch.randn(256, D).cuda().bfloat16()
    losses = []
    for _ in range(45):  # past a search of the masks
        torch.compiler.cudagraph_mark_step_begin()
        loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(sparse_names(model)) == 5 and sparse24.session(model).step == 45
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = torch._inductor.cudagraph_trees.get_container(0).tree_manager
    assert manager is not None and manager.roots  # recorded
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("block", ["gelu", "swiglu", "swiglu_bias"])
def test_no_copy_stands_between_matmul_activation_and_matmul(block: str) -> None:
    """What a compiled layer runs, forward and backward: matmuls, packing, the activation, and sums for biases."""
    from torch.profiler import ProfilerActivity, profile

    model = BLOCKS[block]().cuda().bfloat16()
    run = compiled(model, wgrad="mvue")
    x, dy = torch.randn(2, 512, D, device="cuda").bfloat16().requires_grad_(), torch.randn(1, device="cuda").bfloat16()

    def step() -> None:
        y = run(x)
        torch.autograd.grad(y, [x, *model.parameters()], dy.expand_as(y).contiguous())

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("sparse_gemm" in name for name in names) == 6, names
    assert sum("glu" in name for name in names) == 2 and sum("pack_gradient" in name for name in names) == 1, names
    inside = [name for name in names if "Memcpy HtoD" not in name]  # the seeds of the draws
    inside = [name.lower().replace("_to_copy", "") for name in inside]  # a cast, as Inductor's names spell it
    moved = [n for n in inside if any(word in n for word in ("copy", "clone", "transpose"))]
    assert len(moved) <= 1, names  # dy itself, made contiguous by this test
