"""Whether it is the attached pipeline that runs, and not another one of the same transformer and scheduler."""

from __future__ import annotations

from typing import Any


class Caller:
    """The attached pipeline, whose guidance and start hold for its own runs only.

    Supported pipelines drop their timestep before they set the schedule, and take a new one in every step.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._before: Any = None  # its timestep when the schedule was set: None, or what is left of a run cut short

    def begin_run(self) -> None:
        """The scheduler has a new schedule, of this pipeline or of another one."""
        self._before = getattr(self._pipe, "_current_timestep", None)

    @property
    def running(self) -> Any:
        """The pipeline, inside one of its steps.

        Raises:
            ValueError: another one runs. A subclass that never has a timestep is believed.
        """
        never_called = not hasattr(self._pipe, "_guidance_scale")
        if never_called or getattr(self._pipe, "_current_timestep", self) is self._before:
            name = type(self._pipe).__name__
            raise ValueError(
                f"the transformer was called while {name}, which is attached, does not run, by another pipeline of the "
                f"same parts perhaps; wanted a call of that {name}"
            )
        return self._pipe
