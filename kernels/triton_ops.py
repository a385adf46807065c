"""The Triton twins of `reference`, under the same names: what `ops` takes for CUDA tensors.

Decisions and packed bytes are those of the reference bit by bit (NaN payloads aside); activations agree to rounding.
"""

from .triton_glu import glu, glu_backward, glu_backward_pack, pack_gradient
from .triton_pack import masked_decay_, pack_weights_

__all__ = ["glu", "glu_backward", "glu_backward_pack", "masked_decay_", "pack_gradient", "pack_weights_"]
