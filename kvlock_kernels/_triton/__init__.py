"""Triton kernels, one file per operator; each launcher has the signature of its operator in `torch.ops`."""


class Unsupported(Exception):
    """Why a kernel does not serve a call; raised before anything is written."""
