"""torchtitan's debug model, parallelized by torchtitan as examples/with_torchtitan.py has it, for some steps on CPUs.

    torchrun --nproc_per_node 2 titan.py EXAMPLES FOLDER ARGUMENTS OF TORCHTITAN...

torchtitan's own trainer needs a GPU. What a CPU lacks is replaced: FlexAttention's backward, and the reduction that
divides before it sums. Selective activation checkpoints under tensor parallelism are left out: with torch 2.13 they
fail in AOTAutograd, whatever compiles the blocks ("expected all tensors_saved_with_vc_check to be Tensors").
"""

import sys
from pathlib import Path

import torch
import torchtitan.tools.utils as utils
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

utils.device_type, utils.device_module = "cpu", torch.cpu  # before others import it
sys.path.insert(0, sys.argv[1])

import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.utils import set_spmd_backend  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402

import sparse24  # noqa: E402
import with_torchtitan  # noqa: E402


def attention(self, q_BLNH, k_BLNH, v_BLNH, **_):  # type: ignore[no-untyped-def]
    q, k, v = (t.transpose(1, 2) for t in (q_BLNH, k_BLNH, v_BLNH))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


FlexAttention.forward = attention
dist.init_process_group("gloo")
arguments = ["--module", "with_torchtitan", "--config", "llama3_debugmodel", *sys.argv[3:]]
config = ConfigManager().parse_args(arguments)
assert isinstance(config, with_torchtitan.Trainer.Config) and config._owner is with_torchtitan.Trainer
config.training.mixed_precision_param = "float32"
dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
dims.build_mesh()
set_spmd_backend(config.parallelism.spmd_backend)
config.model_spec.model.update_from_config(config=config)
with torch.device("meta"):
    model = config.model_spec.model.build()
model = config.model_spec.parallelize_fn(
    model,
    parallel_dims=dims,
    training=config.training,
    parallelism=config.parallelism,
    compile_config=config.compile,
    ac_config=config.activation_checkpoint if config.parallelism.tensor_parallel_degree == 1 else None,
    dump_folder=sys.argv[2],
)
for module in model.modules():
    if isinstance(module, FSDPModule):
        module.set_gradient_divide_factor(float(dims.dp_shard) if dims.dp_shard > 1 else None)
model.to_empty(device="cpu")
torch.manual_seed(0)
with torch.no_grad():
    model.init_weights(buffer_device=None)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
session = sparse24.session(model)
positions = torch.arange(64).expand(2, 64)
losses = []
for _ in range(5):
    tokens = torch.randint(0, 2048, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions=positions))
    loss = cross_entropy(getattr(logits, "full_tensor", lambda logits=logits: logits)().flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
session.check_ranks()
reasons = {name: weight.reason_skipped for name, weight in session.weights.items()}
torch.save({"losses": losses, "reasons": reasons}, Path(sys.argv[2], f"{dist.get_rank()}.pt"))
dist.destroy_process_group()
