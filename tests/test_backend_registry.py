"""The backend's place in diffusers' dispatcher: registered once, refused where it is not wanted or does not fit."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import WanPipeline
from diffusers.models import attention_dispatch
from diffusers.models.modeling_utils import ModelMixin

from kvlock import KVLockConfig
from kvlock.adapters import backend_registry

STEPS = 5
CONFIG = KVLockConfig(kappa=3, window=3, tau=0.6)
HOW = r'"kvlock" serves the locked layers.*pass kernel="backend" to attach; elsewhere choose another'


@pytest.fixture
def pipe():
    return tiny.pipeline(WanPipeline)


@pytest.fixture(autouse=True)
def default_stays():
    """The process's default backend is given back, whatever the test did."""
    before = backend_registry.default_backend()
    yield
    backend_registry.set_default_backend(before)


def test_registering_twice_gives_the_same_member_of_a_name_that_diffusers_knows():
    member = backend_registry.register()
    assert backend_registry.register() is member
    assert attention_dispatch.AttentionBackendName("kvlock") is member
    assert [each.value for each in attention_dispatch.AttentionBackendName].count("kvlock") == 1


def test_importing_and_a_session_of_hooks_leave_the_enum_alone():
    code = """if True:
        import sys; sys.path.insert(0, "tests")
        import tiny, kvlock
        from diffusers import WanPipeline
        from diffusers.models.attention_dispatch import AttentionBackendName as Names
        pipe, config = tiny.pipeline(WanPipeline), kvlock.KVLockConfig(kappa=1, fusion=0.5)
        tiny.locked_call(pipe, config, steps=1)
        print("kvlock" in Names._value2member_map_)
        tiny.locked_call(pipe, config, steps=1, kernel="backend")
        print("kvlock" in Names._value2member_map_)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]


def test_outside_a_session_the_first_attention_says_how_to_use_it(pipe):
    plain = tiny.call(pipe, steps=1)
    backend_registry.register()
    pipe.transformer.set_attention_backend("kvlock")
    with pytest.raises(ValueError, match=HOW):
        tiny.call(pipe, steps=1)
    with pytest.raises(ValueError, match=r"blocks\[0\] has no backend to go back to.*" + HOW):
        tiny.locked_call(pipe, CONFIG, steps=STEPS, kernel="backend")
    with pytest.raises(ValueError, match=HOW):
        tiny.locked_call(pipe, CONFIG, steps=STEPS)
    pipe.transformer.set_attention_backend("native")
    assert torch.equal(tiny.call(pipe, steps=1), plain)


def test_after_a_session_the_name_is_no_backend_either(pipe):
    tiny.locked_call(pipe, CONFIG, steps=STEPS, kernel="backend")
    pipe.transformer.set_attention_backend("kvlock")
    with pytest.raises(ValueError, match=HOW):
        tiny.call(pipe, steps=1)


def test_a_default_that_is_the_backend_itself_is_nothing_to_go_back_to(pipe):
    backend_registry.set_default_backend(backend_registry.register())
    with pytest.raises(ValueError, match=r"blocks\[0\] has no backend to go back to.*" + HOW):
        tiny.locked_call(pipe, CONFIG, steps=STEPS, kernel="backend")


def test_the_classes_own_method_inside_a_session_is_refused_at_the_first_attention(pipe):
    with pytest.raises(ValueError, match=HOW), tiny.attached(pipe, CONFIG, kernel="backend"):
        ModelMixin.set_attention_backend(pipe.transformer, "kvlock")
        tiny.call(pipe, steps=STEPS)
    assert all(vars(block.attn1.processor) == {} for block in pipe.transformer.blocks)
    assert backend_registry.default_backend().value != "kvlock"


def test_a_locked_attention_set_to_it_by_hand_is_locked_and_given_back(pipe):
    expected, _ = tiny.locked_call(pipe, CONFIG, steps=STEPS)
    with tiny.attached(pipe, CONFIG, kernel="backend"):
        pipe.transformer.blocks[1].attn1.set_attention_backend("kvlock")
        latents = tiny.call(pipe, steps=STEPS)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert vars(pipe.transformer.blocks[1].attn1.processor) == {}


def test_an_exception_between_a_layers_hook_and_its_attention_leaves_no_layer_announced(pipe):
    def fail(module: Any, args: tuple) -> None:
        if pipe.transformer.blocks[1].attn1.processor._attention_backend is not None:
            raise ZeroDivisionError

    handle = pipe.transformer.blocks[1].attn1.to_v.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), tiny.attached(pipe, CONFIG, kernel="backend"):
        tiny.call(pipe, steps=STEPS)
    handle.remove()
    with pytest.raises(ValueError, match=HOW):
        backend_registry.kvlock_attention(*torch.zeros(3, 1, 1, 1, 1))


class Names(str, Enum):  # noqa: UP042 - as diffusers' own
    NATIVE = "native"


class PlainNames(Enum):
    NATIVE = "native"


class Registry:
    """A registry of the kind there is now."""

    _backends: ClassVar[dict[Any, Any]] = {}
    _active_backend = None

    @classmethod
    def register(cls, backend: Any) -> Callable[[Any], Any]:
        return lambda function: cls._backends.setdefault(backend, function)


def one_of_another_name(*args: Any, **kwargs: Any) -> Any:
    return args[0]


def by_position(query: Any, key: Any, value: Any, *, backend: Any) -> Any:
    return Registry._backends[backend](query, key, value, 0.0, None)


CHANGES: dict[str, dict[str, Any]] = {
    "no-enum": {"AttentionBackendName": None},
    "an-enum-without-strings": {"AttentionBackendName": PlainNames},
    "no-registry": {"_AttentionBackendRegistry": None},
    "a-registry-without-register": {"_AttentionBackendRegistry": object},
    "a-dispatcher-that-asks-nobody": {"dispatch_attention_fn": one_of_another_name},
    "a-dispatcher-with-other-arguments": {"dispatch_attention_fn": by_position},
}


@pytest.fixture(params=CHANGES)
def other_diffusers(request, monkeypatch):
    """A dispatcher that has changed in one respect, and knows nothing of the backend yet."""
    Registry._backends.clear()
    names = {
        "AttentionBackendName": Names,
        "_AttentionBackendRegistry": Registry,
        "dispatch_attention_fn": attention_dispatch.dispatch_attention_fn,
    } | CHANGES[request.param]
    module = SimpleNamespace(**{name: value for name, value in names.items() if value is not None})
    monkeypatch.setattr(backend_registry, "attention_dispatch", module)


def test_another_dispatcher_is_a_clear_error_and_hooks_go_on(pipe, other_diffusers):
    expected, _ = tiny.locked_call(pipe, CONFIG, steps=STEPS)
    message = r'backend "kvlock" does not fit the dispatcher of diffusers \d.*use kernel="hooks" or kernel="fused"'
    with pytest.raises(RuntimeError, match=message), tiny.attached(pipe, CONFIG, kernel="backend"):
        pass
    assert backend_registry.NAME not in Names._value2member_map_
    with tiny.attached(pipe, CONFIG):
        with pytest.raises(RuntimeError, match=message):
            pipe.transformer.set_attention_backend("kvlock")
        assert torch.equal(tiny.call(pipe, steps=STEPS), expected)
    assert tiny.leftovers(pipe) == []
    assert [*Names.__members__] == ["NATIVE"] and [*Names] == [Names.NATIVE] and len(Names._value2member_map_) == 1


def test_the_name_taken_by_another_is_a_clear_error_and_stays_theirs(monkeypatch):
    member = backend_registry.register()

    def theirs(query: Any, key: Any, value: Any) -> Any:
        return query

    table = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setitem(table._backends, member, theirs)
    monkeypatch.setitem(table._supported_arg_names, member, set(inspect.signature(theirs).parameters))
    with pytest.raises(RuntimeError, match=r"does not fit.*went elsewhere"):
        backend_registry.register()
    assert attention_dispatch.AttentionBackendName("kvlock") is member
    assert table._backends[member] is theirs
