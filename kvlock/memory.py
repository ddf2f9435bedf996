"""Running out of memory: torch has no one exception for that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine is too small, rather than something wrong."""
    message = str(error).lower()
    known = ("out of memory", "can't allocate memory", "not enough memory")  # of a GPU; of a CPU, on Linux and Windows
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in message for part in known)
    )
