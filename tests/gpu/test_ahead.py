"""The kernels of a training step are in Triton's cache before this process would compile them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def train(cache: Path) -> None:
    """A training step with an empty cache; fails where a launch added to what the other processes compiled."""
    import torch

    from sparse24.kernels import ahead

    def entries() -> set[str]:
        return {path.parent.name for path in cache.glob("*/*.cubin")}

    ahead._SLOWEST_S = 600  # other tests run beside this one
    wait, compiled = ahead.wait, set[str]()

    def noting() -> None:
        assert bool(ahead._pending) != bool(compiled)  # started once, and waited for at the first launch
        wait()
        compiled.update(entries() if not compiled else ())

    ahead.wait = noting
    up, down = torch.nn.Linear(512, 2048), torch.nn.Linear(2048, 512)
    model = torch.nn.Sequential(up, torch.nn.GELU(), down).cuda().bfloat16()
    run = torch.compile(model, backend="sparse24", options={"when": "always", "inner": "eager", "refresh_every": 1})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x = torch.randn(500, 512, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        run(x).float().square().mean().backward()
        optimizer.step()
    torch.cuda.synchronize()
    assert len(compiled) == 7, compiled
    assert entries() == compiled


def test_a_training_step_compiles_nothing_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    train(Path(sys.argv[1]))
