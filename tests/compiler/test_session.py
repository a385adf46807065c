"""Sessions: saved state, resumed runs, regional compilation, lifetimes."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import sparse24
from sparse24.compiler.session import contents

from .models import MLP, Stack, SwiGLU, compiled, loss_and_grads, masked_twin, relative, sparse_names, train


def test_regional_compilation_shares_one_graph_and_keeps_masks_apart() -> None:
    model, x = Stack(SwiGLU(), SwiGLU(), SwiGLU()), torch.randn(4, 16, 64)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block in model.blocks:
        block.compile(
            backend="sparse24", options={"inner": "aot_eager", "wgrad": "dense", "refresh_every": 1}, fullgraph=True
        )
    model(x)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 2
    )  # x needs no gradient in the first block only
    assert len(sparse_names(model)) == 9
    masks = [sparse24.session(model).weights[f"blocks.{i}.up.weight"].mask() for i in range(3)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    twin = masked_twin(model)
    for block in twin.blocks:
        block._compiled_call_impl = None
    _, grads = loss_and_grads(model, model, x)
    _, expected = loss_and_grads(twin, twin, x)
    assert all(relative(grads[n], expected[n]) < 1e-5 for n in expected)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-1), 2)
    assert sparse24.session(model).step == 2
    sparse24.session(model.blocks[1]).to_dense()  # one block alone
    twin = masked_twin(model)
    for block in twin.blocks:
        block._compiled_call_impl = None
    assert relative(model(x), twin(x)) < 1e-6


def test_one_layer_dense_the_others_sparse() -> None:
    """gate leaves the merged gate-and-up operand; up keeps its mask."""
    model, x = Stack(SwiGLU(), MLP()), torch.randn(4, 64)
    run, session = compiled(model), sparse24.session(model)
    run(x)
    mask = session.weights["blocks.0.up.weight"].mask()
    session.weights["blocks.0.gate.weight"].to_dense()
    assert relative(run(x), masked_twin(model)(x)) < 1e-6
    assert torch.equal(session.weights["blocks.0.up.weight"].mask(), mask)
    session.weights["blocks.0.gate.weight"].to_sparse()
    assert relative(run(x), masked_twin(model)(x)) < 1e-6


CASES = ((1, 2, 6), (3, 0, 6), (7, 0, 5))  # the step of the checkpoint, sparse_after, dense_after
SCRIPT = """
    import sys, torch
    sys.path.insert(0, {here!r})
    from models import MLP, Stack, SwiGLU
    import sparse24

    resumes = sys.argv[1] == "resume"
    if resumes:
        other = torch.compile(Stack(MLP()), backend="sparse24", options={{"inner": "eager"}})
        other(torch.randn(2, 64))  # another model first: layers would be numbered otherwise
    for at, sparse_after, dense_after in {cases}:
        torch.manual_seed(0)
        model = Stack(MLP(), SwiGLU())
        options = {{"inner": "eager", "refresh_every": 2, "wgrad": "mvue", "lr_scale": 2.0}}
        options |= {{"sparse_after": sparse_after, "dense_after": dense_after}}
        run = torch.compile(model, backend="sparse24", options=options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        session = sparse24.session(run)
        if resumes:
            state = torch.load(f"{{at}}.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            session.load_state_dict(state["session"])
        for step in range(at if resumes else 0, 9):
            if step == at and not resumes:
                state = {{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}
                torch.save(state | {{"session": session.state_dict()}}, f"{{at}}.pt")
            data = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            for _ in range(2):
                run(torch.randn(4, 16, 64, generator=data)).square().mean().backward()
            optimizer.step()
            loss = run(torch.ones(1, 64)).square().mean().item().hex()
            print(at, step, loss, session.flip_rate(), session.phase)
"""


def test_resumed_in_a_new_process_the_losses_are_the_same_bits(tmp_path: Path) -> None:
    def go(how: str) -> list[list[str]]:
        code = textwrap.dedent(SCRIPT.format(here=str(Path(__file__).parent), cases=CASES))
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    whole = go("whole")
    assert go("resume") == [line for line in whole if int(line[1]) >= int(line[0])]
    for at, sparse_after, dense_after in CASES:
        phases = ["sparse" if sparse_after <= step < dense_after else "dense" for step in range(1, 10)]
        assert [line[-1] for line in whole if line[0] == str(at)] == phases
    assert len({line[2] for line in whole if line[1] == "8"}) == len(CASES)


def saved(**options: object) -> tuple[nn.Module, dict]:
    model = Stack(MLP())
    run = compiled(model, **options)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    return model, sparse24.session(model).state_dict()


def test_state_is_loaded_after_the_first_forward_too() -> None:
    model, state = saved(refresh_every=1)
    other = Stack(MLP())
    run = compiled(other, refresh_every=1)
    run(torch.randn(2, 64))
    other.load_state_dict(model.state_dict())
    sparse24.session(run).load_state_dict(state)
    run(torch.randn(2, 64))
    name = "blocks.0.up.weight"
    assert torch.equal(sparse24.session(other).weights[name].mask(), sparse24.session(model).weights[name].mask())
    assert sparse24.session(other).step == 2
    again = contents(sparse24.session(other).state_dict())
    assert again["weights"][name]["layer"] == contents(state)["weights"][name]["layer"]


def test_state_survives_torch_save() -> None:
    _, state = saved()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded, kept = contents(torch.load(buffer, weights_only=True)), contents(state)
    assert loaded["recipe"] == kept["recipe"]
    assert torch.equal(loaded["weights"]["blocks.0.up.weight"]["mask"], kept["weights"]["blocks.0.up.weight"]["mask"])


def test_state_of_another_model_names_the_difference() -> None:
    _, state = saved()
    with pytest.raises(
        ValueError, match=r"holds blocks\.0\.up\.weight with shape \(128, 64\), this model's is \(256, 64\)"
    ):
        sparse24.session(Stack(MLP(ff=256))).load_state_dict(state)
    with pytest.raises(ValueError, match=r"holds blocks\.0\.up\.weight, which this model does not have"):
        sparse24.session(nn.Linear(64, 64)).load_state_dict(state)
    larger = Stack(MLP(), MLP())
    compiled(larger)(torch.randn(1, 64))
    with pytest.raises(ValueError, match=r"trains blocks\.1\.up\.weight sparse, which the state does not hold"):
        sparse24.session(larger).load_state_dict(state)
    with pytest.raises(ValueError, match="format None"):
        sparse24.session(larger).load_state_dict({})


def test_state_of_a_layer_that_stays_dense_here() -> None:
    _, state = saved(skip=())
    model = Stack(MLP())
    sparse24.session(model).load_state_dict(state, strict=False)
    with pytest.raises(
        ValueError, match=r"holds blocks\.0\.up\.weight as sparse, but here it stays dense: skip names it"
    ):
        compiled(model, skip=["*.up.weight"])(torch.randn(1, 64))


@pytest.mark.parametrize("before", [True, False])
def test_state_of_another_recipe_names_the_difference(before: bool) -> None:
    _, state = saved(decay=0.25)
    model = Stack(MLP())
    run = compiled(model, decay=0.5)
    message = r"trained with decay=0\.25 \(now 0\.5\)"
    if before:
        sparse24.session(run).load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            run(torch.randn(1, 64))
        sparse24.session(run).load_state_dict(state, strict=False)
        run(torch.randn(1, 64))
    else:
        run(torch.randn(1, 64))
        with pytest.raises(ValueError, match=message):
            sparse24.session(run).load_state_dict(state)
        sparse24.session(run).load_state_dict(state, strict=False)
        assert sparse24.session(run).step == 2


def test_a_weight_gradient_that_is_asked_for_is_not_taken_from_the_state() -> None:
    _, state = saved(wgrad="mvue")
    model = Stack(MLP())
    sparse24.session(model).load_state_dict(state, strict=False)
    compiled(model, wgrad="dense")(torch.randn(1, 64))
    assert {w.wgrad for w in sparse24.session(model).weights.values()} == {"dense"}


def test_the_model_stays_as_it_is() -> None:
    """Same keys, picklable, copyable; a copy trains with masks of its own."""
    model = Stack(MLP())
    keys, types = list(model.state_dict()), [type(p) for p in model.parameters()]
    run = compiled(model)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    assert list(model.state_dict()) == keys and [type(p) for p in model.parameters()] == types
    assert not any("sparse24" in str(vars(p)) for p in model.parameters())
    pickle.loads(pickle.dumps(model))
    copied = copy.deepcopy(model)
    assert sparse24.session(copied).weights == {}
    train(compiled(copied, refresh_every=1), torch.optim.AdamW(copied.parameters(), lr=1e-1), 2)
    assert (sparse24.session(model).step, sparse24.session(copied).step) == (1, 2)


def test_a_dead_model_is_forgotten() -> None:
    from sparse24.compiler import weights

    model = Stack(MLP())
    compiled(model)(torch.randn(1, 64))
    before = len(weights._registry)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(weights._registry) <= before - 3


def test_metrics_and_memory() -> None:
    model = Stack(SwiGLU())
    run, session = compiled(model, refresh_every=5), sparse24.session(model)
    assert session.metrics()["sparse_weights"] == 0.0 and session.weights == {}
    run(torch.randn(1, 64))
    expected = {
        "step": 0.0,
        "sparse": 1.0,
        "flip_rate": 0.0,
        "refresh_every": 5.0,
        "sparse_weights": 3.0,
        "dense_weights": 1.0,
    }
    n = 3 * 64 * 128
    sizes = {"masters": 4 * n, "packed": 2 * n + n // 8, "packed_t": 2 * n + n // 8, "masks": 0}
    expected |= {f"memory/{kind}": float(size) for kind, size in sizes.items()}
    assert session.metrics(per_layer=False) == expected
    expected |= {f"flip_rate/blocks.0.{name}.weight": 0.0 for name in ("gate", "up", "down")}
    assert session.metrics() == expected and {type(v) for v in session.metrics().values()} == {float}
    assert session.memory() == sizes
    session.to_dense()
    assert session.memory() == {"masters": 4 * n, "packed": 0, "packed_t": 0, "masks": n // 8}


def test_flip_rates_of_the_layers_pool_to_that_of_the_model() -> None:
    model = Stack(SwiGLU(), MLP())
    run, session = compiled(model, refresh_every=1), sparse24.session(model)
    run(torch.randn(1, 64))
    before = {name: w.mask() for name, w in session.weights.items() if w.reason_skipped is None}
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-1), 1)
    metrics = session.metrics()
    rates = {name: metrics[f"flip_rate/{name}"] for name in before}
    assert len(rates) == 5 and all(
        rates[name] == (mask != session.weights[name].mask()).float().mean().item() for name, mask in before.items()
    )
    assert 0 < metrics["flip_rate"] == pytest.approx(sum(rates.values()) / 5)  # all of one size


def test_session_of_something_else() -> None:
    with pytest.raises(TypeError, match="found function, need an nn.Module"):
        sparse24.session(lambda x: x)
