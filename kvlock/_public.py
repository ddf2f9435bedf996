"""Where each public name of the package comes from; the package imports this when one of them is asked for."""

# ruff: noqa: F401 - looked up here by kvlock.__getattr__

from kvlock.adapters.attach import attach
from kvlock.adapters.record import record
from kvlock.config import PRESETS, KVLockConfig, preset
from kvlock.geometry import Geometry
from kvlock.job import encode_source
from kvlock.masks import Masks
from kvlock.pipeline import KVLockOutput, KVLockPipeline
from kvlock.recording import Recording
from kvlock.session import Session
from kvlock.store import Store
from kvlock.trace import Trace
