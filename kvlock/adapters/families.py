"""What is known of each supported transformer and pipeline: where its self-attention is and how it is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvlock.config import KVLockConfig
from kvlock.locked_layers import LayerKey


@dataclass(frozen=True)
class Family:
    """One transformer class.

    Attributes:
        blocks: name of the main blocks' list.
        batched: keyword arguments of the forward with a sample axis, beside hidden_states, timestep and the prompt.
        attention: name of the video self-attention inside a block.
        key, value: names inside the attention whose outputs are K (after its norm, before RoPE) and V.
        control_blocks: name of the control blocks' list, or None.
        controlled: name, in the transformer's config, of the main blocks that control blocks add to, one each; or None.
        prompt_mask: name of the forward's argument that marks the prompt's tokens [B, L], or None where zeros pad it.
        token_grid: the forward's arguments that say T, h and w, where latents reach transformer and scheduler as tokens
            [B, T * h * w, C]; None where they are videos.
        joint_branches: whether one forward has both guidance branches, the unconditional samples first.
        guidance_follows: whether the pipeline looks up its guidance scale anew in each step.
    """

    blocks: str
    batched: tuple[str, ...]
    attention: str = "attn1"
    key: str = "norm_k"
    value: str = "to_v"
    control_blocks: str | None = None
    controlled: str | None = None
    prompt_mask: str | None = None
    token_grid: tuple[str, str, str] | None = None
    joint_branches: bool = False
    guidance_follows: bool = False


FAMILIES = {
    "WanTransformer3DModel": Family("blocks", batched=("encoder_hidden_states_image",)),
    "WanVACETransformer3DModel": Family(
        "blocks",
        batched=("encoder_hidden_states_image", "control_hidden_states"),
        control_blocks="vace_blocks",
        controlled="vace_layers",
    ),
    "SkyReelsV2Transformer3DModel": Family("blocks", batched=("encoder_hidden_states_image",)),
    "LTXVideoTransformer3DModel": Family(
        "transformer_blocks",
        batched=(),
        prompt_mask="encoder_attention_mask",
        token_grid=("num_frames", "height", "width"),
        joint_branches=True,
        guidance_follows=True,
    ),
}

# Parts of the names diffusers gives to hooks that skip blocks or attention.
BLOCK_CACHES = ("cache", "fbc", "pyramid_attention_broadcast")

# Pipelines, and the class of the transformer that each runs.
PIPELINES = {
    "WanPipeline": "WanTransformer3DModel",
    "WanVideoToVideoPipeline": "WanTransformer3DModel",
    "WanVACEPipeline": "WanVACETransformer3DModel",
    "SkyReelsV2Pipeline": "SkyReelsV2Transformer3DModel",
    "LTXPipeline": "LTXVideoTransformer3DModel",
}

# Pipelines whose first latents are the noised video, not pure noise.
STARTS_FROM_VIDEO = ("WanVideoToVideoPipeline",)


def pipeline_class(pipe: Any) -> type:
    """The class in the table that the pipeline is of, or derives from.

    Raises:
        ValueError: there is none; names its class and the supported ones.
    """
    for base in type(pipe).__mro__:
        if base.__name__ in PIPELINES:
            return base
    raise ValueError(f"{type(pipe).__name__} is not supported; supported pipelines: {', '.join(PIPELINES)}")


def transformers_of(pipe: Any) -> dict[str, Any]:
    """The pipeline's transformers by their places in it, None in one that is empty or not there."""
    return {part: getattr(pipe, part, None) for part in ("transformer", "transformer_2")}


def check_pipeline(pipe: Any) -> None:
    """Refuse a pipeline that is not in the table, or that has the transformer of another one.

    Raises:
        ValueError: as `pipeline_class` or `check_pair`.
    """
    known = pipeline_class(pipe).__name__
    for module in transformers_of(pipe).values():
        if module is not None:
            check_pair(known, type(unwrap(module)).__name__)


def check_pair(pipeline: str, transformer: str) -> None:
    """Refuse a supported transformer class under a supported pipeline class that cannot run it.

    Raises:
        ValueError: names both, and the transformer that the pipeline runs.
    """
    wanted = PIPELINES[pipeline]
    if transformer in FAMILIES and transformer != wanted:
        raise ValueError(f"{pipeline} runs a {wanted}; found a {transformer}")


def unwrap(module: nn.Module) -> nn.Module:
    """The module behind `torch.compile`'s wrapper."""
    return getattr(module, "_orig_mod", module)


def family_of(transformer: nn.Module) -> Family:
    """The table's row for this transformer.

    Raises:
        ValueError: the class is not in the table, or the module is set up in a way the taps cannot follow.
    """
    module: Any = unwrap(transformer)
    name = type(module).__name__
    if name not in FAMILIES:
        raise ValueError(f"transformer {name} is not supported; supported transformers: {', '.join(FAMILIES)}")
    if module.dtype == torch.float64:  # what it computes in: parts may be stored or kept in others
        wanted = "torch.float32, torch.bfloat16 or torch.float16, which the operators take"
        raise ValueError(f"transformer {name} has dtype {module.dtype}; wanted {wanted}")
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{name}.compile() in place also compiles the hook that runs the source; use compile_repeated_blocks() "
            "instead, or pipe.transformer = torch.compile(pipe.transformer) before attach"
        )
    if getattr(module, "is_cache_enabled", False) or _has_cache_hook(module):
        raise ValueError(f"{name} has a block cache enabled, which skips the blocks to lock; disable the cache first")
    family = FAMILIES[name]
    if family.token_grid and (sides := (module.config.patch_size_t, module.config.patch_size)) != (1, 1):
        raise ValueError(f"{name} has patches of {sides} latents (time, side); wanted a token for each latent")
    for block in getattr(module, family.blocks):
        if getattr(getattr(block, family.attention), "fused_projections", False):
            raise ValueError(f"{name} has fused QKV projections that bypass to_v; call unfuse_qkv_projections() first")
    return family


def _has_cache_hook(transformer: nn.Module) -> bool:
    return any(part in name for name in hooks_of_diffusers(transformer) for part in BLOCK_CACHES)


def hooks_of_diffusers(transformer: nn.Module) -> list[str]:
    """The names of the hooks that diffusers has put on the transformer and on its parts."""
    registries = [getattr(module, "_diffusers_hook", None) for module in transformer.modules()]
    return [name for registry in registries if registry is not None for name in registry.hooks]


def locked_attentions(transformer: nn.Module, config: KVLockConfig) -> Iterator[tuple[LayerKey, Any]]:
    """The self-attentions to lock, with their keys, in order of execution within each list of blocks.

    Raises:
        ValueError: `config` names a layer that is not there, or control blocks where there are none.
    """
    family = family_of(transformer)
    module: Any = unwrap(transformer)
    main = getattr(module, family.blocks)
    for layer in config.layers or ():
        if layer >= len(main):
            raise ValueError(f"layers names block {layer}; {type(module).__name__} has {len(main)}, numbered from 0")
    chosen = [(family.blocks, i) for i in config.layers or range(len(main))]
    if config.control_blocks:
        if family.control_blocks is None:
            raise ValueError(f"control_blocks=True, but {type(module).__name__} has no control blocks; wanted False")
        chosen += [(family.control_blocks, i) for i in range(len(getattr(module, family.control_blocks)))]
    for stack, i in chosen:
        attention = getattr(getattr(module, stack)[i], family.attention)
        yield LayerKey(stack, i, "kv", heads=attention.heads), attention


def tapped_modules(transformer: nn.Module, config: KVLockConfig) -> Iterator[tuple[LayerKey, nn.Module]]:
    """The modules of `locked_attentions` whose outputs are K and V, with their keys; raises what that raises."""
    family = family_of(transformer)
    for key, attention in locked_attentions(transformer, config):
        yield key._replace(tensor="k"), getattr(attention, family.key)
        yield key._replace(tensor="v"), getattr(attention, family.value)
