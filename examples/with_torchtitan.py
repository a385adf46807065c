"""torchtitan with 2:4 sparse feed-forward layers: a module of configurations for its `--module`.

    PYTHONPATH=examples torchrun --nproc_per_node 8 -m torchtitan.train --module with_torchtitan --config llama3_8b

Each configuration is torchtitan's own of that name with two settings changed, and two things that no setting does:

    parallelism.spmd_backend = "partial_dtensor"     DTensors under tensor parallelism alone
    compile.enable = True                            then the blocks are compiled by sparse24
    `parallelize`                                    takes the options of sparse24; torchtitan's compile.backend takes a
                                                     name alone, and refuses others than its own for FlexAttention
    `Trainer`                                        puts the masks into the checkpoint

Written against torchtitan 0.3.0. `sparse(config, **options)` makes the same of any of its configurations whose model
keeps its blocks in `model.layers`. Without pipeline parallelism: each stage would need a state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torchtitan.trainer as titan
from torch import nn
from torchtitan.models.llama3 import config_registry

import sparse24


class Trainer(titan.Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(titan.Trainer.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        (model,) = self.model_parts
        self.checkpointer.states["sparse24"] = sparse24.session(model)


def sparse(config: Any, **options: Any) -> Any:
    """A torchtitan configuration, with the blocks of its model compiled by sparse24; options: of sparse24.Recipe."""
    spec = config.model_spec

    def parallelize(model: Any, *, compile_config: Any, **others: Any) -> nn.Module:
        if not compile_config.enable or "model" not in compile_config.components:
            return spec.parallelize_fn(model, compile_config=compile_config, **others)
        model = spec.parallelize_fn(model, compile_config=replace(compile_config, enable=False), **others)
        for block in model.layers.values():
            block.compile(backend="sparse24", options=options)
        return model

    values = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    changed = Trainer.Config(**values | {"model_spec": replace(spec, parallelize_fn=parallelize)})
    changed.parallelism.spmd_backend = "partial_dtensor"
    changed.compile.enable = True
    return changed


def llama3_8b() -> Any:
    config = config_registry.llama3_8b()
    return sparse(config, dense_after=5 * config.training.steps // 6)


def llama3_debugmodel() -> Any:
    return sparse(config_registry.llama3_debugmodel(), refresh_every=2)
