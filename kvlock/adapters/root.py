"""Hooks around a call of the transformer: they bring the source in before it and hand its prediction to the session."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from kvlock.adapters.families import Family, hooks_of_diffusers, unwrap
from kvlock.adapters.layout import Layout
from kvlock.config import KVLockConfig
from kvlock.session import Session


def install(
    transformer: nn.Module,
    family: Family,
    session: Session,
    expert: int,
    layout: Layout,
    branches_of: Callable[[], int],
) -> list[Any]:
    """Hook the module the pipeline calls; returns the handles to remove.

    Args:
        expert: number of the transformer in its pipeline.
        layout: of the latents that it takes and gives.
        branches_of: tells, in a call, how many guidance branches it has.

    Raises:
        ValueError: another session is on this transformer, through another pipeline perhaps.
    """
    if any(getattr(hook, "func", None) is _before for hook in transformer._forward_pre_hooks.values()):
        raise ValueError(f"{type(unwrap(transformer)).__name__} is attached already; leave that context first")
    names = tuple(inspect.signature(type(unwrap(transformer)).forward).parameters)[1:]
    before = functools.partial(
        _before,
        names=names,
        family=family,
        session=session,
        expert=expert,
        layout=layout,
        branches_of=branches_of,
    )
    after = functools.partial(_after, session=session, layout=layout)
    return [
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after),
    ]


def _before(
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    names: tuple[str, ...],
    family: Family,
    session: Session,
    expert: int,
    layout: Layout,
    branches_of: Callable[[], int],
) -> tuple[tuple, dict[str, Any]] | None:
    if session.in_source_pass:
        return None
    call = dict(zip(names, args, strict=False)) | kwargs
    if family.token_grid:
        layout.require(tuple(call.get(name) for name in family.token_grid))
    edit, branches = layout.video(call["hidden_states"]), branches_of()
    samples = edit[: len(edit) // branches]  # every branch has the same latents
    x = session.begin_call(expert, samples, call["timestep"], _conditions(call, family), branches=branches)
    if x is None:  # nothing of the source is needed for this call
        return None
    rows = _source_rows(call, layout.of_model(x), family, session)
    if session.config.source == "store":
        with session.source_pass(), _up_to_the_last_lock(module, family, session.config):
            module(**(call | rows))
        return None
    both = {name: torch.cat([_expand(row, len(x)), _expand(call[name], len(edit))]) for name, row in rows.items()}
    return (), call | both


@contextlib.contextmanager
def _up_to_the_last_lock(transformer: nn.Module, family: Family, config: KVLockConfig) -> Iterator[None]:
    """Inside, the transformer has no main block after the last one that locks, nor control blocks that add to those.

    What it gives then means nothing. Control blocks that lock stay, and all blocks do where `_places_weights`.
    """
    module: Any = unwrap(transformer)
    blocks = len(getattr(module, family.blocks))
    wanted = config.source_blocks(blocks)
    if wanted == blocks or _places_weights(transformer):
        yield
        return
    counts = {family.blocks: wanted}
    if family.control_blocks is not None and family.controlled is not None and not config.control_blocks:
        counts[family.control_blocks] = sum(block < wanted for block in module.config[family.controlled])
    whole = {name: getattr(module, name) for name in counts}
    try:
        for name, count in counts.items():
            setattr(module, name, whole[name][:count])
        yield
    finally:
        for name, stack in whole.items():
            setattr(module, name, stack)


def _places_weights(transformer: nn.Module) -> bool:
    """Whether hooks bring weights to a device, or to several, and count on every block.

    One of accelerate's moves all blocks that it finds and looks at the first weight alone to see whether it has; others
    carry activations from device to device; and in diffusers a group of weights may fetch the next group.
    """
    by_accelerate = any(hasattr(part, "_hf_hook") for part in transformer.modules())
    return by_accelerate or any("offload" in name for name in hooks_of_diffusers(transformer))


def _conditions(call: dict[str, Any], family: Family) -> dict[str, Any]:
    """What the source's forward has in common with the edit's: of batched arguments the first sample."""
    own = ("hidden_states", "timestep", "encoder_hidden_states", "return_dict", family.prompt_mask)
    given = {name: value for name, value in call.items() if value is not None and name not in own}
    given["prompt_tokens"] = call["encoder_hidden_states"].shape[1]  # padding counts: the source's prompt gets the same
    return {name: value[:1] if name in family.batched else value for name, value in given.items()}


def _expand(value: Tensor, batch: int) -> Tensor:
    """One row for all samples, as a pipeline may pass a prompt, made one row a sample."""
    return value.expand(batch, *value.shape[1:])


def _source_rows(call: dict[str, Any], x: Tensor, family: Family, session: Session) -> dict[str, Tensor]:
    """The call's batched arguments for the source: its latents and prompt, everything else as the edit has it."""
    batch, edit = len(x), call["hidden_states"]
    prompt = call["encoder_hidden_states"]
    rows = {
        "hidden_states": x.to(edit.dtype),
        "timestep": call["timestep"][:batch],
        "encoder_hidden_states": session.source.prompt(prompt, batch),
    }
    if family.prompt_mask is not None:
        rows[family.prompt_mask] = session.source.prompt_mask(call[family.prompt_mask], batch)
    return rows | {name: call[name][:batch] for name in family.batched if call.get(name) is not None}


def _after(module: nn.Module, args: tuple, output: Any, *, session: Session, layout: Layout) -> Any:
    if session.in_source_pass:
        return None
    if isinstance(output, tuple):
        return (layout.of_model(session.end_call(layout.video(output[0]))), *output[1:])
    output.sample = layout.of_model(session.end_call(layout.video(output.sample)))
    return output


def run_on_source_only(transformer: Any, family: Family, session: Session) -> Callable[[], None]:
    """Let the transformer answer every call but the source's with zeros, without running.

    Returns:
        What takes this off again.
    """
    before = vars(transformer).get("forward")  # of an offloaded module
    forward, active = transformer.forward, [True]
    model: Any = unwrap(transformer)
    names, channels = tuple(inspect.signature(type(model).forward).parameters)[1:], model.config["out_channels"]

    def answer(*args: Any, **kwargs: Any) -> Any:
        if session.in_source_pass or not active:
            return forward(*args, **kwargs)
        call = dict(zip(names, args, strict=False)) | kwargs
        x = call["hidden_states"]
        zeros = torch.zeros_like(x[..., :channels] if family.token_grid else x[:, :channels])
        return (zeros,) if not call.get("return_dict", True) else Transformer2DModelOutput(sample=zeros)

    def undo() -> None:
        active.clear()  # somebody may have put a wrapper around it since, and keeps it
        if vars(transformer).get("forward") is not answer:
            return
        if before is None:
            del transformer.forward
        else:
            transformer.forward = before

    transformer.forward = answer
    return undo
