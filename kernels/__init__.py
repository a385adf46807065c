"""The ops: their torch.library face, an eager reference, Triton kernels, matmul providers, layouts."""
