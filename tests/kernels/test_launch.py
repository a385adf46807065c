"""What `launch` keeps of a launch: a kernel is found again where Triton would run the same one, and only there."""

import pytest
import torch

triton_launch = pytest.importorskip("sparse24.kernels.triton_launch")

CPU = torch.device("cpu")


class Kernel:
    """Stands for a kernel f(x, n, A: constexpr, B: constexpr); counts what is compiled and notes what runs."""

    arg_names = ("x", "n", "A", "B")

    def __init__(self):
        self.compiled, self.ran = 0, []
        self.fn = lambda: None

    def __getitem__(self, grid):
        def compile_and_run(x, n, A, B, **options):
            assert options == {"num_warps": 4, "enable_fp_fusion": False}
            self.compiled += 1
            self.ran.append((grid, x, n, A, B))
            return Compiled(self)

        return compile_and_run

    def warmup(self, x, n, A, B, grid, **options):
        assert options == {"num_warps": 4, "enable_fp_fusion": False}
        self.compiled += 1
        return Compiled(self)


class Compiled:
    packed_metadata = 12, 1, 2048  # warps, programs of a cluster, bytes of shared memory

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.ran.append((grid[: 3 - grid[:3].count(1)], *args))


def launch(kernel, x, n, grid=(2,), A=1):
    triton_launch.launch(kernel, grid, CPU, x, n, num_warps=4, B=64, A=A)


def test_a_launch_like_an_earlier_one_compiles_nothing_and_passes_the_same():
    kernel, x = Kernel(), torch.zeros(64)
    for n, grid in ((32, (2,)), (48, (2,)), (48, (2, 3))):
        launch(kernel, x, n, grid)
    assert kernel.compiled == 1
    assert [ran[0] for ran in kernel.ran] == [(2,), (2,), (2, 3)]
    assert [ran[1:] for ran in kernel.ran] == [(x, 32, 1, 64), (x, 48, 1, 64), (x, 48, 1, 64)]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64).bfloat16()},
        {"x": torch.zeros(65)[1:]},  # at an address that is not a multiple of 16
        {"n": 33},
        {"n": 1},
        {"n": 2**31},
        {"n": 32.0},
        {"A": 2},
    ],
)
def test_what_triton_would_compile_anew_is_compiled_anew(other):
    kernel, usual = Kernel(), {"x": torch.zeros(64), "n": 32}
    launch(kernel, **usual)
    launch(kernel, **{**usual, **other})
    assert kernel.compiled == 2


def test_a_key_takes_the_place_of_looking_at_the_arguments():
    kernel, x = Kernel(), torch.zeros(64)
    for n, key in ((32, "a"), (33, "a"), (33, "b")):
        triton_launch.launch(kernel, (2,), CPU, x, n, key=key, num_warps=4, B=64, A=1)
    assert kernel.compiled == 2
    assert [ran[1:] for ran in kernel.ran] == [(x, 32, 1, 64), (x, 33, 1, 64), (x, 33, 1, 64)]


def test_an_empty_grid_is_no_launch():
    kernel = Kernel()
    launch(kernel, torch.zeros(64), 32, grid=(2, 0))
    assert not kernel.ran


def test_a_cluster_is_a_launch_of_its_own():
    kernel, x = Kernel(), torch.zeros(64)
    for cluster in (1, 2, 2):
        triton_launch.launch(kernel, (3,), CPU, x, 32, cluster=cluster, num_warps=4, B=64, A=1)
    assert kernel.compiled == 2
    assert kernel.ran == [((3,), x, 32, 1, 64)] * 3
    found = [c.packed_metadata for c, _ in triton_launch._compiled.values() if getattr(c, "kernel", None) is kernel]
    assert found == [(12, 1, 2048), (12, 2, 2048)]
