"""The scheduler of one pipeline, patched on the instance: it tells the session of a new schedule and asks it for v."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from kvlock.adapters.layout import Layout
from kvlock.flow import Flow, check_scheduler
from kvlock.session import Session

STEP_ARGUMENTS = ("model_output", "timestep", "sample")


def install(scheduler: Any, session: Session, layout: Layout) -> None:
    """Patch `set_timesteps` and `step` of this scheduler object, which steps latents of this layout.

    The new methods hold only the class's own function and find the rest on `self`, so that a deep copy of the scheduler
    works on its own state.

    Raises:
        ValueError: the scheduler is not supported, or is patched already.
    """
    check_scheduler(scheduler)
    arguments = tuple(inspect.signature(type(scheduler).step).parameters)[1:4]
    if arguments != STEP_ARGUMENTS:
        raise ValueError(
            f"{type(scheduler).__name__}.step takes {', '.join(arguments)} first; wanted {', '.join(STEP_ARGUMENTS)}"
        )
    for name in ("set_timesteps", "step"):
        if name in vars(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__}.{name} is patched on this object already, by another session for example; "
                "leave that context first"
            )
    scheduler.kvlock_session, scheduler.kvlock_layout = session, layout
    scheduler.set_timesteps = types.MethodType(_set_timesteps(type(scheduler).set_timesteps), scheduler)
    scheduler.step = types.MethodType(_step(type(scheduler).step), scheduler)


def remove(scheduler: Any) -> None:
    """Undo `install`."""
    for name in ("set_timesteps", "step", "kvlock_session", "kvlock_layout"):
        vars(scheduler).pop(name, None)


def _set_timesteps(original: Any) -> Any:
    @functools.wraps(original)  # pipelines read the signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.kvlock_session.set_schedule(Flow.from_scheduler(self), self.timesteps)

    return set_timesteps


def _step(original: Any) -> Any:
    @functools.wraps(original)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        session: Session = self.kvlock_session
        layout: Layout = self.kvlock_layout
        velocity = layout.of_model(session.guide(layout.video(model_output), layout.video(sample)))
        result = original(self, velocity, timestep, sample, *args, **kwargs)
        if isinstance(result, tuple):
            return (layout.of_model(session.finish_step(layout.video(result[0]))), *result[1:])
        result.prev_sample = layout.of_model(session.finish_step(layout.video(result.prev_sample)))
        return result

    return step
