"""examples/train_fsdp.py; where torchrun may start it again, rank 1 dies in the midst of step 5 of its first life.

torchrun --nproc_per_node 2 --max-restarts 1 killed.py EXAMPLES ARGUMENTS...
"""

import os
import signal
import sys

import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, sys.argv[1])

import train_fsdp  # noqa: E402

steps = 0


def die(*_: object) -> None:
    global steps
    steps += 1
    if steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)


dist.init_process_group("gloo")
first_life = os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if first_life and dist.get_rank() == 1:
    register_optimizer_step_pre_hook(die)
train_fsdp.main(sys.argv[2:])
dist.barrier()  # none leaves while another still talks to it
dist.destroy_process_group()
