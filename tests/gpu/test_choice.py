"""What is chosen where something is wrong: a faulty algorithm, another packed format, a GPU without sparse cores."""

import logging
import threading

import pytest
import torch

from sparse24.kernels import choice, cusparselt, format_check, layout, ops, providers, reference

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def product(dtype=torch.bfloat16, tokens=256):
    """packed, x and the exact product."""
    w = torch.randn(256, 128, device=GPU).to(dtype)
    mask = reference.best_mask(w)
    x = torch.randn(tokens, 128, device=GPU).to(dtype)
    return layout.pack(w, mask, layout.metadata_order(GPU)), x, x.double() @ (w * mask).double().t()


def error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Choices are measured anew, and kept apart."""
    monkeypatch.setenv("SPARSE24_CACHE", str(tmp_path))
    choice._store.cache_clear()
    monkeypatch.setattr(choice, "_choices", {})
    yield tmp_path
    choice._store.cache_clear()


def test_the_format_is_the_known_one():
    assert format_check.check(GPU) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_format_is_noticed_and_its_own_compressor_serves(monkeypatch, caplog, dtype):
    packed, x, exact = product(dtype)
    problem = providers.Problem("spmm", 256, 128, 256, dtype, GPU)
    monkeypatch.setattr(layout, "arch", lambda device: "sm_80")  # the bytes that this library does not write
    format_check.check.cache_clear()
    with caplog.at_level(logging.WARNING, "sparse24"):
        assert "another order than the known one" in (format_check.check(GPU) or "")
    assert "its own compressor serves" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(format_check, "check", lambda device: "another order")
    for provider in (providers.CusparseLt(), providers.TorchCusparselt()):
        assert error(provider.run(problem, packed, x, None), exact) < 1e-2
    monkeypatch.undo()
    format_check.check.cache_clear()


def test_an_algorithm_that_errs_or_is_wrong_is_struck(monkeypatch, own_cache, caplog):
    packed, x, exact = product()
    problem = providers.Problem("spmm", 256, 128, 256, torch.bfloat16, GPU)
    honest = choice.measure(problem)
    run = providers.CusparseLt.run

    def faulty(self, problem, packed, x, algorithm):
        if algorithm == honest.algorithm:
            raise cusparselt.Failed("cuSPARSELt: matmul returned status 7")
        y = run(self, problem, packed, x, algorithm)
        return y * 1.1 if algorithm % 2 else y  # wrong without an error

    monkeypatch.setattr(providers.CusparseLt, "run", faulty)
    found = choice.measure(problem)
    assert (found.provider, found.algorithm) != (honest.provider, honest.algorithm)
    assert found.provider != "cusparselt" or found.algorithm % 2 == 0
    assert "wrong numbers" in caplog.text
    assert error(ops.spmm(packed, x, 256), exact) < 1e-2


def test_a_damaged_or_foreign_cache_is_ignored_with_a_warning(own_cache, caplog):
    packed, x, exact = product()
    ops.spmm(packed, x, 256)
    (file,) = own_cache.glob("*.json")
    for text in ("{", file.read_text().replace(torch.cuda.get_device_name(GPU), "another GPU")):
        file.write_text(text)
        choice._store.cache_clear()
        choice._choices.clear()
        caplog.clear()
        assert error(ops.spmm(packed, x, 256), exact) < 1e-2
        assert "ignored the cache of measured choices" in caplog.text


def test_a_chosen_algorithm_that_fails_later_is_replaced(monkeypatch, own_cache, caplog):
    packed, x, exact = product()
    ops.spmm(packed, x, 256)

    def fails(self, *args):
        raise cusparselt.Failed("cuSPARSELt: matmul returned status 6")

    monkeypatch.setattr(providers.CusparseLt, "run", fails)
    monkeypatch.setattr(providers.TorchCusparselt, "run", fails)
    assert error(ops.spmm(packed, x, 256), exact) < 1e-2
    assert "masked dense matmuls serve" in caplog.text


def test_a_gpu_without_sparse_tensor_cores_leaves_all_dense_and_says_so(monkeypatch, caplog):
    import sparse24

    from ..compiler.models import MLP, Stack, sparse_names

    monkeypatch.setattr(layout, "arch", lambda device: None if device.type == "cuda" else "sm_90")
    model = Stack(MLP(256, 1024), d=256).cuda().bfloat16()
    x = torch.randn(64, 256, device=GPU).bfloat16()
    with caplog.at_level(logging.WARNING, "sparse24"):
        y = torch.compile(model, backend="sparse24", options={"inner": "eager"})(x)
    assert torch.equal(y, model(x)) and not sparse_names(model)
    reasons = {w.reason_skipped for w in sparse24.session(model).weights.values()}
    assert any("has no sparse tensor cores" in reason for reason in reasons)
    assert caplog.text.count("has no sparse tensor cores") <= 2  # one line a layer, none a call


def test_streams_and_threads_multiply_at_once():
    packed, x, exact = product(tokens=1000)
    ops.spmm(packed, x, 256)
    torch.cuda.synchronize()
    errors: dict[int, float] = {}

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            ys = [ops.spmm(packed, x, 256) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            errors[i] = max(error(y, exact) for y in ys)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4 and max(errors.values()) < 1e-2


def test_a_matmul_in_a_cuda_graph_reads_what_its_inputs_hold_at_replay():
    packed, x, exact = product()
    ops.spmm(packed, x, 256)  # measured and planned outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.spmm(packed, x, 256)
    x.mul_(2)
    graph.replay()
    assert error(y, 2 * exact) < 1e-2


def test_no_memory_for_packing_leaves_weights_and_packed_form():
    """The kernels write in place; what is asked for is a few bytes of counts, and that comes first."""
    w = torch.randn(256, 128, device=GPU).bfloat16()
    packed, packed_t = (
        torch.zeros(layout.numel(*s, w.dtype), dtype=w.dtype, device=GPU) for s in ((256, 128), (128, 256))
    )
    blocks = [layout.Block(w, packed, packed_t, 0, 0, 256, 128)]
    ops.pack_weights_(blocks, True)
    before = [x.clone() for x in (w, packed, packed_t)]
    w.mul_(2)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            while True:  # the allocator's rest first
                before.append(torch.empty(2**20, device=GPU))
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(10000):
                before.append(ops.pack_weights_(blocks * 3000, True))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(packed.view(torch.int16), before[1].view(torch.int16)) or torch.equal(
        layout.read_mask(packed, 256, 128, layout.metadata_order(GPU)),
        layout.read_mask(before[1], 256, 128, layout.metadata_order(GPU)),
    )
    assert torch.equal(w, 2 * before[0])
    ops.pack_weights_(blocks, True)
    assert (
        error(ops.spmm(packed, torch.eye(128, device=GPU).bfloat16(), 256).t(), (w * reference.best_mask(w)).double())
        < 1e-2
    )
