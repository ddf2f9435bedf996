"""How a table of bad inputs is checked: the message names the argument, what was found and what is wanted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Bad(NamedTuple):
    """One bad call: the arguments that replace good ones, and three things that the message must say."""

    changes: dict[str, Any]
    name: str
    found: str
    wanted: str


def bad_inputs(*rows: Bad) -> pytest.MarkDecorator:
    """Parametrises a test with `bad`, ids such as ratio-shape-[3]."""
    ids = [f"{row.name}-{row.found}".replace(" ", "-") for row in rows]
    return pytest.mark.parametrize("bad", rows, ids=ids)


def assert_refused(function: Callable[..., Any], good: dict[str, Any], bad: Bad) -> None:
    """Calls with one argument replaced, wants the ValueError, then wants the good call to pass."""
    with pytest.raises(ValueError) as caught:
        function(**(good | bad.changes))
    name, rest = str(caught.value).split(": found ", 1)
    found, wanted = rest.split(", wanted ", 1)
    assert name == bad.name
    assert bad.found in found
    assert bad.wanted in wanted
    function(**good)
