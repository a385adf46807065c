"""Runs before any test imports Triton: without a GPU the kernels run under its interpreter, on CPU tensors."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when @triton.jit decorates, Triton's own functions included
