"""A training program of the reader's own."""

import torch
from my_models import GPT

model = GPT(width=128, depth=1)
torch.compile(model, backend="sparse24", options={"inner": "eager"})(torch.randint(256, (2, 32))).backward()
