"""One weight through the ops that take many; `stats` is overwritten."""

from sparse24.kernels.layout import Block


def pack_weight_(impl, w, packed, packed_t, stats, row, col, rows, cols, search):
    stats.copy_(impl.pack_weights_([Block(w, packed, packed_t, row, col, rows, cols)], search)[0])


def masked_decay_(impl, grad, w, packed, row, col, rows, cols, decay):
    impl.masked_decay_([grad], [Block(w, packed, packed, row, col, rows, cols)], decay)
