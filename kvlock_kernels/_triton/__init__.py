"""Triton kernels; the launchers that `_cuda` registers have the signatures of their operators in `torch.ops`."""


class Unsupported(Exception):
    """Why a kernel does not serve a call; raised before anything is written."""
