"""KV-Lock: training-free video editing that locks the background's attention keys and values to the source."""

from kvlock.adapters.attach import attach
from kvlock.config import PRESETS, KVLockConfig, preset
from kvlock.geometry import Geometry
from kvlock.masks import Masks
from kvlock.pipeline import KVLockOutput, KVLockPipeline, encode_source
from kvlock.session import Session
from kvlock.trace import Trace

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Geometry",
    "KVLockConfig",
    "KVLockOutput",
    "KVLockPipeline",
    "Masks",
    "Session",
    "Trace",
    "attach",
    "encode_source",
    "preset",
]
