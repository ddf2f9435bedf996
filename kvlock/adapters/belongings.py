"""What source rows belong to, noted in a recording or compared with one: the model, its layers, and the source."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvlock.adapters.families import locked_attentions, unwrap
from kvlock.config import KVLockConfig
from kvlock.manifest import hash_of
from kvlock.masks import Masks
from kvlock.recorder import Recorder
from kvlock.recording import Recording

SAMPLES = 64  # values of each parameter that stand for it
ADAPTER = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")  # of peft's layers, beside weights


def agree_on_model(
    ledger: Recorder | Recording,
    pipe: Any,
    transformers: Sequence[nn.Module],
    kernel: str,
    config: KVLockConfig,
) -> None:
    """Transformers, the layers that are locked, and the scheduler; waits for a few values of all weights.

    A layer that the fused pass serves rounds otherwise than one it does not, also while the source runs: its layers are
    all the recorded ones, where other kernels may lock fewer.

    Raises:
        ValueError: they are not those of the recording, or weights are out of reach.
    """
    scheduler = pipe.scheduler
    modules: list[Any] = [unwrap(module) for module in transformers]
    ledger.agree(
        transformers=[type(module).__name__ for module in modules],
        dtypes=[str(module.dtype) for module in modules],
    )
    keys = [(i, key) for i, module in enumerate(transformers) for key, _ in locked_attentions(module, config)]
    layers = [f"{i}.{key.stack}.{key.block}" for i, key in keys]
    if kernel == "fused":
        ledger.agree(layers=layers)
    else:
        ledger.agree_on_part(layers=layers)
    shift = getattr(scheduler.config, "flow_shift", None) or getattr(scheduler.config, "shift", None)
    ledger.agree(scheduler=type(scheduler).__name__, shift=shift)
    ledger.agree(boundary_ratio=getattr(pipe.config, "boundary_ratio", None))
    ledger.agree_on_settings({f"{i}.{name}": value for i, m in enumerate(modules) for name, value in _settings(m)})
    ledger.agree(weights=[fingerprint(module) for module in modules])


def agree_on_source(
    ledger: Recorder | Recording, source_latents: Tensor, masks: Masks, source_prompt_embeds: Tensor | None
) -> None:
    """The source's size, mask, latents and prompt; an edit need not know the prompt.

    Raises:
        ValueError: they are not those of the recording.
    """
    ledger.agree(latents=list(source_latents.shape[1:]), tokens=masks.num_tokens)
    ledger.agree(background_rows=masks.background_rows, mask=hash_of(masks.index))
    ledger.agree_on_tensor("source_latents", source_latents.float())
    if source_prompt_embeds is not None:
        ledger.agree(source_prompt=hash_of(source_prompt_embeds))


def _settings(module: Any) -> Iterator[tuple[str, Any]]:
    """Of its diffusers config, as JSON types."""
    for name, value in dict(getattr(module, "config", {})).items():
        if not name.startswith("_"):  # where it was loaded from, and by which version
            yield name, json.loads(json.dumps(value, default=repr))


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a module's parameters, of a few values of each, and of its adapters.

    Another checkpoint or a merged adapter differs in nearly every value, and an adapter that is put on adds names;
    reading all values would take as long as loading the model. What hooks do is not seen.

    Raises:
        ValueError: a parameter has no values, because they are offloaded one module at a time.
    """
    state = hashlib.sha256()
    samples: list[Tensor] = []
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"{type(module).__name__} has its {name} offloaded out of reach, and a recording belongs to weights; "
                "wanted model or group offload"
            )
        state.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode())
        flat = weight.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float())
    for _, parts in itertools.groupby(samples, key=lambda part: part.device):  # once for a run of parameters
        state.update(torch.cat(list(parts)).cpu().numpy().tobytes())
    for name, part in module.named_modules():
        settings = [(key, getattr(part, key, None)) for key in ADAPTER]
        settings = [(key, value) for key, value in settings if value is not None and not callable(value)]
        if settings:
            state.update(f"{name} {settings}\n".encode())
    return state.hexdigest()
