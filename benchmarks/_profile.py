"""What the steps of an edit spend their time on, from a trace of torch's profiler."""

from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

LARGEST = 5  # kernels or operators in a note
OURS = "kvlock::"  # in front of what this package calls its host's work and waits


def activities(device: str) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]


def summary(seen: Any, device: str, seconds: float) -> str:
    """The largest shares of a trace of so many seconds: by operator, or on a GPU by kernel.

    On a GPU its kernels and copies come first, as a share of the time, and then what the host does for rows outside the
    device and waits for. Streams that overlap count twice, and what the host waits for may overlap with the GPU's work.
    """
    events = seen.key_averages()
    if not device.startswith("cuda"):
        return _largest({event.key: event.self_cpu_time_total for event in events})
    # A range of the host is shown on the device too, above the kernels that it launched.
    kernels = {event.key: event.self_device_time_total for event in events
               if event.device_type == DeviceType.CUDA and not event.is_user_annotation}  # fmt: skip
    said, waits = _largest(kernels), host(seen, seconds)
    work = f"GPU work of {sum(kernels.values()) / 1e6 / seconds:.0%} of the time: {said}"
    return f"{work}; the host: {waits}" if waits else work


def host(seen: Any, seconds: float) -> str:
    """What the host does and waits for by this package's names, in shares of the time."""
    spent = {event.key.removeprefix(OURS): event.cpu_time_total / 1e6 / seconds for event in seen.key_averages()
             if event.device_type == DeviceType.CPU and event.key.startswith(OURS)}  # fmt: skip
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(spent.items(), key=lambda each: -each[1]))


def _largest(spent: dict[str, float]) -> str:
    whole = sum(spent.values()) or 1
    largest = sorted(spent, key=lambda key: -spent[key])[:LARGEST]
    return ", ".join(f"{key[:60]} {spent[key] / whole:.0%}" for key in largest)
