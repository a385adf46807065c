"""Launch each Gluon variant for Hopper twice on the first shape of gluon.py, for a profiler:

    ncu --set full --clock-control none --kernel-name regex:^kernel$ python benchmarks/gluon_profile.py

The first launch of each warms the caches up; the second one counts.
"""

import argparse

import torch
from gluon import FIRST, WGMMA

from sparse24.kernels import gluon_wgmma, layout, ops


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", nargs="+", choices=list(WGMMA), default=list(WGMMA), metavar="NAME", help="which")
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the input")
    args = p.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("benchmarks/gluon_profile.py needs a Hopper GPU (compute capability 9.0); there is none here")
    inner, rows = FIRST[0]
    w = torch.randn(rows, inner, device="cuda").bfloat16()
    packed = layout.pack(w, ops.best_mask(w), "sm_90")
    x = torch.randn(args.tokens, inner, device="cuda").bfloat16()
    for name in args.variants:
        for _ in range(2):
            gluon_wgmma.multiply(gluon_wgmma.Variant(**WGMMA[name]), packed, x, rows, inner, False)
        torch.cuda.synchronize()
        print(name)


if __name__ == "__main__":
    main()
