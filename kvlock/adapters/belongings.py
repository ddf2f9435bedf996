"""What source rows belong to, noted in a recording or compared with one: the model, its layers, and the source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvlock.adapters.families import locked_attentions, unwrap
from kvlock.adapters.kernels import Lock, point_of
from kvlock.config import KVLockConfig
from kvlock.masks import Masks
from kvlock.recorder import Recorder
from kvlock.recording import Recording, hash_of

SAMPLES = 64  # values of each parameter that stand for it


def note_model(
    ledger: Recorder | Recording, pipe: Any, transformers: Sequence[nn.Module], lock: Lock, config: KVLockConfig
) -> None:
    """Transformers, layers and scheduler.

    Raises:
        ValueError: they are not those of the recording; or the layers are compiled, whose code fetches nothing.
    """
    scheduler = pipe.scheduler
    modules = [unwrap(module) for module in transformers]
    ledger.note(
        transformers=[type(module).__name__ for module in modules],
        dtypes=[str(module.dtype) for module in modules],
        point=point_of(lock.kernel),
    )
    keys = [(i, key) for i, module in enumerate(transformers) for key, _ in locked_attentions(module, config)]
    ledger.note_some(layers=[f"{i}.{key.stack}.{key.block}" for i, key in keys])
    shift = getattr(scheduler.config, "flow_shift", None) or getattr(scheduler.config, "shift", None)
    ledger.note(scheduler=type(scheduler).__name__, shift=shift)
    ledger.note(weights=[fingerprint(module) for module in modules])


def note_source(
    ledger: Recorder | Recording, source_latents: Tensor, masks: Masks, source_prompt_embeds: Tensor | None
) -> None:
    """The source's size, mask, latents and prompt; an edit need not know the prompt.

    Raises:
        ValueError: they are not those of the recording.
    """
    ledger.note(latents=list(source_latents.shape[1:]), tokens=masks.num_tokens)
    ledger.note(background_rows=masks.background_rows, mask=hash_of(masks.index))
    ledger.note_tensor("source_latents", source_latents.float())
    if source_prompt_embeds is not None:
        ledger.note(source_prompt=hash_of(source_prompt_embeds))


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a module's parameters and of a few values of each.

    Another checkpoint, a merged adapter or one put on differs in nearly every value; reading all of them would take
    as long as loading the model.
    """
    state = hashlib.sha256()
    samples = []
    for name, weight in module.named_parameters():
        state.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode())
        if not weight.is_meta:  # of an offloaded module the values are elsewhere
            flat = weight.detach().reshape(-1)
            samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float())
    by_device: dict[torch.device, list[Tensor]] = {}
    for sample in samples:
        by_device.setdefault(sample.device, []).append(sample)
    for parts in by_device.values():
        state.update(torch.cat(parts).cpu().numpy().tobytes())
    return state.hexdigest()
