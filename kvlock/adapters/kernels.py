"""Where the lock acts: the kinds of layers by name, and the kind a session has chosen."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvlock.adapters.backend import BackendLayers
from kvlock.adapters.backend_registry import NAME
from kvlock.adapters.families import locked_attentions, tapped_modules, unwrap
from kvlock.adapters.fused import FusedLayers
from kvlock.adapters.taps import Taps
from kvlock.config import KVLockConfig
from kvlock.locked_layers import LayerKey, LockedLayers, LockState

KERNELS: dict[str, tuple[type[LockedLayers], Callable[..., Iterator[tuple[LayerKey, Any]]]]] = {
    "hooks": (Taps, tapped_modules),
    "fused": (FusedLayers, locked_attentions),
    "backend": (BackendLayers, locked_attentions),
}


def check_kernel(kernel: str) -> None:
    """Wants the name of a kind of layers.

    Raises:
        ValueError: it is another, and these are the known ones.
    """
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is not known; wanted one of {', '.join(map(repr, KERNELS))}")


def point_of(kernel: str) -> str:
    """Where in the attention this kind of layer records and mixes."""
    return KERNELS[kernel][0].point


class Lock:
    """The locked layers of a session's transformers, all of one kind, so that one place mixes."""

    def __init__(self, kernel: str, state: LockState, experts: Sequence[tuple[int, Any]], config: KVLockConfig) -> None:
        self.kernel = kernel
        self.layers = KERNELS[kernel][0](state)
        self._state = state
        self._experts = experts  # numbers and transformers
        self._config = config

    def install(self) -> None:
        """Take hold of the layers.

        Raises:
            ValueError: one does not fit, or is held by another session.
        """
        self.layers.install(self._parts())

    def require_same(self) -> None:
        """The layers are the very ones that were installed, and still fit; raises ValueError otherwise."""
        self.layers.require_same(self._parts())

    def remove(self) -> None:
        self.layers.remove()

    def change(self, kernel: str) -> None:
        """Let go of the layers and take hold of those of another kind.

        Raises:
            ValueError: one does not fit; those of the earlier kind stay.
            RuntimeError: this kind does not work here; likewise.
        """
        if kernel == self.kernel:
            return
        earlier = self.kernel, self.layers
        layers = KERNELS[kernel][0](self._state)
        self.layers.remove()
        self.kernel, self.layers = kernel, layers
        try:
            self.install()
        except BaseException:
            self.remove()
            self.kernel, self.layers = earlier
            self.install()
            raise

    def _parts(self) -> Iterator[tuple[LayerKey, Any]]:
        """Looked up anew, and refused where it does not fit, each time."""
        for i, module in self._experts if self._config.locks else ():
            if self._state.shelf is not None:
                _refuse_compiled(module)
            for key, part in KERNELS[self.kernel][1](module, self._config):
                yield key._replace(expert=i), part


def _refuse_compiled(transformer: Any) -> None:
    """Rows that wait elsewhere are fetched by Python between two layers, which compiled code does not come back to.

    Raises:
        ValueError: the transformer or a part of it is compiled.
    """
    compiled = [name for name, module in transformer.named_modules() if module._compiled_call_impl is not None]
    if transformer is not unwrap(transformer) or compiled:
        raise ValueError(
            f"{type(unwrap(transformer)).__name__} is compiled{f' ({compiled[0]})' if compiled else ''}, and source "
            "rows of another place than the device, or of a recording, cannot reach its layers; wanted a transformer "
            "that is not compiled, or rows on the device"
        )


def listen(transformer: Any, choose: Callable[[], None]) -> Callable[[], None]:
    """Let `set_attention_backend("kvlock")` of this transformer call `choose`, and change no backend itself.

    The class's method would set every attention of the model and the process's default, and forget what they had.

    Returns:
        What takes this off again.

    Raises:
        ValueError: the method is patched on this object already, by another session for example.
    """
    module: Any = unwrap(transformer)
    if "set_attention_backend" in vars(module):
        raise ValueError(
            f"{type(module).__name__} is attached already: set_attention_backend is patched; leave that context first"
        )

    def set_attention_backend(self: Any, backend: str) -> None:
        if backend.lower() == NAME:
            choose()
        else:
            type(self).set_attention_backend(self, backend)

    module.set_attention_backend = types.MethodType(set_attention_backend, module)
    return lambda: vars(module).pop("set_attention_backend", None)
