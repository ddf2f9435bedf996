"""Recording a source: a call of the pipeline in which the transformer runs on the source alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kvlock.adapters import root
from kvlock.adapters.attach import check_settings, fitting, on_pipeline
from kvlock.adapters.families import family_of, transformers_of
from kvlock.config import KVLockConfig
from kvlock.masks import Masks
from kvlock.recorder import Recorder
from kvlock.source_session import SourceSession
from kvlock.store import Store


@contextlib.contextmanager
def record(
    pipe: Any,
    path: str | Path,
    source_latents: Tensor,
    masks: Masks,
    *,
    config: KVLockConfig | None = None,
    source_prompt_embeds: Tensor | None = None,
    kernel: str = "hooks",
    store: Store | None = None,
) -> Iterator[SourceSession]:
    """Record the source rows of one call of `pipe` inside the `with` block, for any number of edits later on.

    The call is made as an edit would be, with the same conditions, size and steps; its transformer runs on the source
    in the steps that the config locks and not at all otherwise, and what it returns means nothing. The recording
    appears at `path` when the block is left without an error, and not at all otherwise. Its noise is that of the call,
    and it belongs to the model as that was in the call.

    Args:
        path: a folder that is not there yet.
        store: in which dtype rows are stored; its place is the recording.

    The other arguments are those of `attach`, which takes the recording.

    Yields:
        The session, whose trace counts the forwards.

    Raises:
        ValueError: as `attach`; there is something at `path`; the settings lock nothing; no step was recorded, or the
            call did not come to its end; or the disk is full (the message says what could not be written).
    """
    config = KVLockConfig() if config is None else config
    store = fitting(store, kernel)
    check_settings(config, masks, store, kernel)
    check_recordable(config, store)
    with contextlib.ExitStack() as undo:
        recorder = Recorder(path)
        undo.callback(recorder.close)
        session = undo.enter_context(
            on_pipeline(
                pipe,
                source_latents,
                masks,
                config=config,
                source_prompt_embeds=source_prompt_embeds,
                kernel=kernel,
                store=store,
                shelf=recorder,
                ledger=recorder,
                session_type=SourceSession,
            )
        )
        recorder.agree(config=config.to_dict(), rows={"dtype": store.dtype, "k_mean": store.takes_mean})
        for module in transformers_of(pipe).values():
            if module is not None:
                undo.callback(root.run_on_source_only(module, family_of(module), session))
        yield session
        recorder.finish()


def check_recordable(config: KVLockConfig, store: Store) -> None:
    """Wants settings with rows to record, and a store that says nothing of their place; raises ValueError."""
    if not config.locks or config.source != "store":
        raise ValueError(
            f"fusion={config.fusion!r} with source={config.source!r} stores no rows, and a recording is nothing else"
        )
    if store.place != "device":
        raise ValueError(f"place={store.place!r} of the store: a recording is its own place; wanted only the dtype")
