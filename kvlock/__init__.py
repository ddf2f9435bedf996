"""KV-Lock: training-free video editing that locks the background's attention keys and values to the source."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlock._public import (
        PRESETS,
        Geometry,
        KVLockConfig,
        KVLockOutput,
        KVLockPipeline,
        Masks,
        Recording,
        Session,
        Store,
        Trace,
        attach,
        encode_source,
        preset,
        record,
    )

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Geometry",
    "KVLockConfig",
    "KVLockOutput",
    "KVLockPipeline",
    "Masks",
    "Recording",
    "Session",
    "Store",
    "Trace",
    "attach",
    "encode_source",
    "preset",
    "record",
]

# Modules that come with the names, so that `import kvlock` is enough for `kvlock.masks.binarize`.
_MODULES = (
    "adapters", "config", "flow", "geometry", "masks", "pipeline", "recording", "run", "session", "store", "trace",
)  # fmt: skip

if not TYPE_CHECKING:  # type checkers would otherwise accept every name

    def __getattr__(name: str) -> Any:
        """Import the package proper when one of its names is first asked for: torch takes seconds, `--help` none."""
        if name not in __all__ and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from kvlock import _public

        globals().update({public: getattr(_public, public) for public in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
