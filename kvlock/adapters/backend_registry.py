"""A backend named "kvlock" in diffusers' attention dispatcher: the one file that touches its enum and its registry."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import diffusers
import torch
from diffusers.models import attention_dispatch
from torch import Tensor

NAME = "kvlock"
HOW = (
    f'the attention backend "{NAME}" serves the locked layers of a pipeline inside `with kvlock.attach(...)`: there '
    f'call pipe.transformer.set_attention_backend("{NAME}"), or pass kernel="backend" to attach; elsewhere choose '
    'another, with set_attention_backend("native") for example'
)


class Layer(Protocol):
    """What attends in the place of a backend."""

    @property
    def name(self) -> str: ...
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor: ...


class _Running(threading.local):
    """The layer whose attention module has begun to run, until its attention is called.

    Global because the dispatcher is: it hands a backend the tensors and nothing to tell a layer by. A thread has its
    own; a context variable would do as well, but torch.compile does not trace one.
    """

    layer: Layer | None = None


_running = _Running()


def announce(layer: Layer | None) -> None:
    """The next call of the backend is this layer's, or nobody's."""
    _running.layer = layer


def kvlock_attention(
    query: Tensor,  # [B, M, H, D]
    key: Tensor,  # [B, N, H, D]
    value: Tensor,  # [B, N, H, D]
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The attention of the layer announced last, which uses key and value up: [B, M, H, D].

    Its arguments have the names the dispatcher knows; what it is not told of it drops without a word.

    Raises:
        ValueError: no layer is announced, or an argument is set that a locked layer has no use for.
    """
    layer, _running.layer = _running.layer, None
    if layer is None:
        raise ValueError(HOW)
    refused = {
        "attn_mask": attn_mask is not None,
        "dropout_p": dropout_p != 0,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "return_lse": return_lse,
        "parallel_config": _parallel_config is not None,
    }
    for argument, given in refused.items():
        if given:
            raise ValueError(
                f'{layer.name} calls its attention with {argument}, which kernel="backend" does not serve; '
                'use kernel="hooks"'
            )
    return layer.attend(query, key, value, scale=scale)


def register() -> Any:
    """The member of diffusers' enum that stands for `kvlock_attention`; made at the first call, and there to stay.

    That call makes torch.compile compile anew, once, what it had compiled before: it is guarded on the table's length.

    Raises:
        RuntimeError: diffusers' dispatcher is not the one this was written for, or the name is taken.
    """
    try:
        members, backends = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
        member = members._value2member_map_.get(NAME)
        if member is not None:
            _try(member)
            return member
        member = str.__new__(members, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        backends.register(member)(kvlock_attention)
        with _named(members, member):
            _try(member)
    except Exception as error:  # whatever another dispatcher answers with, it is another dispatcher
        raise RuntimeError(
            f'the attention backend "{NAME}" does not fit the dispatcher of diffusers {diffusers.__version__} '
            f'({type(error).__name__}: {error}); use kernel="hooks" or kernel="fused"'
        ) from error
    return member


@contextlib.contextmanager
def _named(members: Any, member: Any) -> Iterator[None]:
    """Add the member to the enum, which is closed to everyone else; take it out again after an exception."""
    with contextlib.ExitStack() as undo:
        for table, entry in ((members._value2member_map_, member.value), (members._member_map_, member.name)):
            table[entry] = member
            undo.callback(table.pop, entry)
        members._member_names_.append(member.name)
        undo.callback(members._member_names_.remove, member.name)
        yield
        undo.pop_all()


def _try(member: Any) -> None:
    """Wants one attention by way of diffusers' dispatcher to arrive here."""
    found = attention_dispatch.AttentionBackendName(NAME)
    if found is not member or NAME not in {each.value for each in attention_dispatch.AttentionBackendName}:
        raise LookupError(f"the enum does not give back its member {NAME!r}")
    probe = _Probe()
    announce(probe)
    try:
        attention_dispatch.dispatch_attention_fn(*torch.zeros(3, 1, 1, 1, 1, device="cpu"), backend=member)
    finally:
        announce(None)
    if not probe.reached:
        raise LookupError(f"attention by way of {NAME!r} went elsewhere")


class _Probe:
    name = "the probe"

    def __init__(self) -> None:
        self.reached = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        self.reached = True
        return q


def default_backend() -> Any:
    """The backend of every processor in the process that has none of its own."""
    return attention_dispatch._AttentionBackendRegistry._active_backend


def set_default_backend(backend: Any) -> None:
    """Put back what `default_backend` gave."""
    attention_dispatch._AttentionBackendRegistry.set_active_backend(backend)
