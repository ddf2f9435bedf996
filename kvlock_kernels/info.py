"""What serves each operator on this machine, and why: `python -m kvlock_kernels.info`."""

import torch

from kvlock_kernels import _cuda, _extension
from kvlock_kernels._ops import NAMESPACE

WITHOUT_HEADS = ("windowed_variance_", "lock_schedule", "guided_velocity")  # they take samples of any shape


def on_cpu(name: str) -> str:
    """What serves operator `name` on the CPU."""
    if _extension.serves(f"{NAMESPACE}::{name}", "CPU"):
        return "extension"
    return "reference: nothing else serves it on the CPU"


def on_cuda(name: str, device: int) -> str:
    """What serves operator `name` on this GPU."""
    within = ""
    if _extension.serves(f"{NAMESPACE}::fallback_{name}", "CUDA"):
        if _extension.has_code_for(device):
            return "extension: it has code for this GPU"
        within = f"; the extension has code for {', '.join(_extension.architectures())} only"
    reason = _cuda.why_not(torch.device("cuda", device))
    heads = "" if name in WITHOUT_HEADS else " serves head dimensions up to 256"
    return f"reference: {reason}" if reason else f"Triton: a kernel{heads}{within}"


def built() -> str:
    """What was built."""
    path = _extension.path()
    if path is None:
        return f"not built; build it with {_extension.BUILD}"
    if not _extension.serves(f"{NAMESPACE}::pack_kv", "CPU"):
        return f"{path} cannot be loaded; build it again: {_extension.BUILD}"
    parts = ", ".join(_extension.architectures())
    return f"{path}, for the CPU" + (f" and for CUDA architectures {parts}" if parts else ", without a CUDA part")


def lines() -> list[str]:
    """The report."""
    found = [f"torch      {torch.__version__}", f"extension  {built()}"]
    for name in _cuda.OPERATORS:
        found += [name, f"    CPU     {on_cpu(name)}"]
        found += [f"    cuda:{i}  {on_cuda(name, i)}" for i in range(torch.cuda.device_count())]
    return found if torch.cuda.is_available() else [*found, "No CUDA device was found."]


if __name__ == "__main__":
    print("\n".join(lines()))
