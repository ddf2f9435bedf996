"""Putting a session on a pipeline and taking it off again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor

from kvlock.adapters import root, shim
from kvlock.adapters.belongings import agree_on_model, agree_on_source
from kvlock.adapters.caller import Caller
from kvlock.adapters.families import STARTS_FROM_VIDEO, check_pipeline, family_of, pipeline_class, transformers_of
from kvlock.adapters.kernels import Lock, check_kernel, listen, point_of
from kvlock.adapters.layout import Layout
from kvlock.adapters.prompts import empty_prompt, without_padding
from kvlock.config import KVLockConfig
from kvlock.locked_layers import LockState
from kvlock.masks import Masks
from kvlock.memory import is_out_of_memory
from kvlock.places import Shelf, shelf_of
from kvlock.recorder import Recorder
from kvlock.recording import RecordedShelf, Recording
from kvlock.session import Session
from kvlock.source import Source
from kvlock.store import PLACES, Store

AnySession = TypeVar("AnySession", bound=Session)


@contextlib.contextmanager
def attach(
    pipe: Any,
    source_latents: Tensor,
    masks: Masks,
    *,
    config: KVLockConfig | None = None,
    source_prompt_embeds: Tensor | None = None,
    kernel: str = "hooks",
    store: Store | None = None,
    recording: Recording | None = None,
) -> Iterator[Session]:
    """Lock the background of every call of `pipe` inside the `with` block; leaving it restores the pipeline exactly.

    Args:
        pipe: an unmodified diffusers pipeline whose transformer and scheduler are supported.
        source_latents: [1 or B, C, T, h, w], the source video's latents, normalised as the pipeline does and as
            `kvlock.encode_source` gives them; with reference images their own clean latents come first on T.
        masks: what to lock, measure and guide, for the same size.
        config: settings; None is `KVLockConfig()`.
        source_prompt_embeds: [1 or B, L, C] as ``pipe.encode_prompt`` gives them; zero rows at the end are padding, and
            become as many as the call's own prompt has; None encodes "" and says so. LTX gives a mask beside them
            instead, whose tokens alone are wanted: ``embeds[:, mask[0]]``.
        kernel: where the lock acts. ``"hooks"`` on the outputs of key norm and value projection, with every attention;
            ``"fused"`` in one pass with Wan's QK norm and RoPE, rounded once instead of three times (so that in half
            precision a ratio of 0 is not the plain pipeline to the last bit); ``"backend"`` in the attention itself,
            after norm and RoPE, as a backend of diffusers' dispatcher: locked calls of these layers are computed by
            `kvlock_kernels.kv_lerp_attention_`, everything else by the backend that was active before. With
            ``fusion="full"`` that earlier backend serves the locked calls too, and attends to the source's rows with
            the edit's foreground rows behind them. For these there is room where rows stay on the device in the dtype
            of the model: a step then keeps as much as all tokens take, and samples that share a source use the room
            one after the other. Rows of any other store, and those of a recording, are joined anew in each call.
            Inside the block ``pipe.transformer.set_attention_backend("kvlock")`` chooses it too, for all transformers
            of the pipeline and until the block is left; another name sets the backend for everything else.
        store: how and where source rows are kept; None is `Store()`, on the device in the dtype of the model.
        recording: source rows made by `kvlock.record`, in place of a source pass. It has its own store, and knows its
            source prompt, which `source_prompt_embeds` must equal where it is given. An edit with another seed keeps
            the recorded noise for the source, and a warning says so.

    Yields:
        The session; ``session.trace`` records each step, also after the block.

    Raises:
        ValueError: an argument is of another type or holds NaN or infinity; the pipeline, its transformer, its
            scheduler or a setting is not supported, or `pipe` is attached already; or the kernel does not fit it; or
            the recording belongs to another model, schedule, size, mask or source, or a file of it is not what was
            recorded. Inside the block: the transformer was changed in a way that the lock would not follow, or is not
            the recording's any more; or something else than `pipe` called it, such as a pipeline that shares its parts.
        RuntimeError: ``kernel="backend"``, and the dispatcher of this diffusers has no place for it.
    """
    config = KVLockConfig() if config is None else config
    store = fitting(store, kernel)
    check_settings(config, masks, store, kernel)
    check_recording(recording, config, store)
    if not config.locks:
        recording = None
    with contextlib.ExitStack() as undo:
        shelf = shelf_of(store) if recording is None else RecordedShelf(recording)
        if shelf is not None:
            undo.callback(shelf.close)
        session = undo.enter_context(
            on_pipeline(
                pipe,
                source_latents,
                masks,
                config=config,
                source_prompt_embeds=source_prompt_embeds,
                kernel=kernel,
                store=store,
                shelf=shelf,
                ledger=recording,
                session_type=Session,
            )
        )
        if isinstance(shelf, RecordedShelf):
            shelf.verify_ahead()
        try:
            yield session
        except (MemoryError, RuntimeError) as error:
            held = is_out_of_memory(error) and recording is None and config.locks and config.source == "store"
            if held and store.place != PLACES[-1]:
                place = PLACES[PLACES.index(store.place) + 1]
                more = f"Store(place={place!r}) or --place {place}"
                error.add_note(f"source rows are kept on the {store.place}; {more} has more room")
            raise


@contextlib.contextmanager
def on_pipeline(
    pipe: Any,
    source_latents: Tensor,
    masks: Masks,
    *,
    config: KVLockConfig,
    source_prompt_embeds: Tensor | None,
    kernel: str,
    store: Store,
    shelf: Shelf | None,
    ledger: Recorder | Recording | None,
    session_type: type[AnySession],
) -> Iterator[AnySession]:
    """A session on a pipeline, whatever becomes of its source rows; the other arguments are those of `attach`.

    Args:
        shelf: where the rows are, if not with their layers.
        ledger: what says what they belong to: a recording, or one in the making.
    """
    _check_numbers("source_latents", source_latents)
    if source_prompt_embeds is not None:
        _check_numbers("source_prompt_embeds", source_prompt_embeds)
    check_pipeline(pipe)
    attached = transformers_of(pipe)
    experts = _experts(pipe)
    families = {i: family_of(module) for i, module in experts}
    if config.locks and source_prompt_embeds is None and not isinstance(ledger, Recording):
        source_prompt_embeds = empty_prompt(pipe)
    if config.locks and source_prompt_embeds is not None:
        source_prompt_embeds = without_padding(source_prompt_embeds)

    family = families[experts[0][0]]
    joint = family.joint_branches
    t, h, w = masks.latent.shape[2:]
    layout = Layout((t, h, w) if family.token_grid else None)
    full = config.fusion == "full" and (config.branches == "both" or not joint)  # for each sample of a call
    source = Source(masks, source_latents, source_prompt_embeds)
    state = LockState(source.masks.index, masks.num_tokens, full=full, store=store, shelf=shelf)
    lock = Lock(kernel, state, experts, config)
    if ledger is not None:
        ledger.agree(point=point_of(kernel), kernel=kernel)
        if isinstance(ledger, Recording):  # one in the making belongs to the model that makes it
            agree_on_model(ledger, pipe, [module for _, module in experts], kernel, config)
        agree_on_source(ledger, source_latents, masks, source_prompt_embeds)

    caller = Caller(pipe)

    def begin_run() -> None:
        caller.begin_run()
        for part, found in transformers_of(pipe).items():
            if found is not attached[part]:
                raise ValueError(
                    f"pipe.{part} has been replaced by {type(found).__name__} since attach; wanted the one that was "
                    "attached: leave the block, change or compile the model, then attach"
                )

    def check_model() -> None:
        lock.require_same()
        if ledger is not None:  # again, for weights may have changed since
            agree_on_model(ledger, pipe, [module for _, module in experts], kernel, config)

    session = session_type(
        config,
        source,
        rows=lock.layers,
        begin_run=begin_run,
        check_model=check_model,
        guidance_of=lambda expert: _guidance(caller, expert, config),
        begin_index_of=lambda: getattr(pipe.scheduler, "begin_index", None),
        starts_from_video=pipeline_class(pipe).__name__ in STARTS_FROM_VIDEO,
        guidance_follows=family.guidance_follows,
        ledger=ledger,
    )

    def choose_backend() -> None:
        if ledger is not None:
            ledger.agree(point=point_of("backend"), kernel="backend")
        try:
            lock.change("backend")
        finally:
            session.use_rows(lock.layers)

    def branches_of() -> int:
        return 2 if joint and caller.running.do_classifier_free_guidance else 1

    with contextlib.ExitStack() as undo:
        shim.install(pipe.scheduler, session, layout)
        undo.callback(shim.remove, pipe.scheduler)
        undo.callback(lock.remove)
        undo.callback(session.close)
        for i, module in experts:
            for handle in root.install(module, families[i], session, i, layout, branches_of):
                undo.callback(handle.remove)
        lock.install()
        for _, module in experts:
            undo.callback(listen(module, choose_backend))
        yield session


def fitting(store: Store | None, kernel: str) -> Store:
    """The store, with what it leaves to the kernel decided."""
    if isinstance(store, Store) and store.k_mean is None and kernel == "fused":
        return dataclasses.replace(store, k_mean=False)
    return Store() if store is None else store


def check_settings(config: KVLockConfig, masks: Masks, store: Store, kernel: str) -> None:
    """Wants settings of the right types that go together; raises ValueError otherwise."""
    for name, value, wanted in (("config", config, KVLockConfig), ("masks", masks, Masks)):
        if not isinstance(value, wanted):
            raise ValueError(f"{name} is a {type(value).__name__}; wanted a kvlock.{wanted.__name__}")
    check_kernel(kernel)
    check_store(store, config, kernel)
    if config.composite == "pixel":
        raise ValueError('composite="pixel" needs the decoded video; use KVLockPipeline, or "latent" or "none" here')
    if masks.dilate_tokens != config.dilate_tokens:
        raise ValueError(
            f"masks were made with dilate_tokens={masks.dilate_tokens}, the config has {config.dilate_tokens}; "
            "wanted them alike"
        )


def check_store(store: Store, config: KVLockConfig, kernel: str) -> None:
    """Refuse a store that the settings or the kernel have no use for.

    Raises:
        ValueError: says which, and what goes with it.
    """
    if not isinstance(store, Store):
        raise ValueError(f"store is a {type(store).__name__}; wanted a kvlock.Store")
    if dataclasses.replace(store, k_mean=None) != Store() and config.locks and config.source == "batch":
        raise ValueError(f'{store}: source="batch" stores no rows; wanted source="store"')
    if store.k_mean and kernel == "fused":
        raise ValueError('k_mean=True of the store: kernel="fused" stores keys as they are; wanted another kernel')


def check_recording(recording: Recording | None, config: KVLockConfig, store: Store) -> None:
    """Refuse settings that a recording has no use for.

    Raises:
        ValueError: says which.
    """
    if recording is None:
        return
    if not isinstance(recording, Recording):
        raise ValueError(f"recording is a {type(recording).__name__}; wanted a kvlock.Recording")
    if dataclasses.replace(store, k_mean=None) != Store():
        raise ValueError(f"{store} is for a source pass, and a recording has its rows already; leave it out")
    if config.source == "batch":
        raise ValueError('source="batch" runs the source beside the edit; a recording wants source="store"')


def _experts(pipe: Any) -> list[tuple[int, Any]]:
    """The pipeline's transformers with their numbers; raises ValueError where there is none, or one twice."""
    experts = [(i, module) for i, module in enumerate(transformers_of(pipe).values()) if module is not None]
    if not experts:
        raise ValueError(f"{type(pipe).__name__} has no transformer; wanted one to lock")
    if len(experts) == 2 and experts[0][1] is experts[1][1]:
        raise ValueError("transformer and transformer_2 are one module; wanted two, or transformer_2=None")
    return experts


def _check_numbers(name: str, value: Tensor) -> None:
    """Wants a floating-point tensor of finite numbers; waits for its device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; wanted a tensor")
    if not value.is_floating_point() or value.is_meta:
        raise ValueError(f"{name} is a tensor of {value.dtype} on {value.device}; wanted floating point with values")
    if not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; wanted finite numbers")


def _guidance(caller: Caller, expert: int, config: KVLockConfig) -> float:
    pipe = caller.running
    rescale = getattr(pipe, "_guidance_rescale", 0.0)
    measured = config.fusion == "variance" and config.x0 == "guided"
    if rescale and (config.guides or measured) and pipe.guidance_scale > 1:
        does = "replace" if config.guides else "measure without it"
        raise ValueError(
            f"guidance_rescale={rescale:g} rescales the pipeline's own guidance, which these settings {does}; wanted 0"
        )
    second = getattr(pipe, "_guidance_scale_2", None)
    return float(second if expert == 1 and second is not None else pipe.guidance_scale)
