"""The source prompt's embeddings, without the padding that its pipeline gives them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kvlock.adapters.families import family_of
from kvlock.geometry import transformer_of


@torch.no_grad()
def encode_prompt(pipe: Any, text: str, **length: int) -> Tensor:
    """Embeddings [1, L, C] of one text, as the pipeline makes them, without the tokens that its mask leaves out.

    Args:
        length: the pipeline's ``max_sequence_length``, where it is not the default of its `encode_prompt`.
    """
    embeds, second = pipe.encode_prompt(text, do_classifier_free_guidance=False, **length)[:2]
    if family_of(transformer_of(pipe)).prompt_mask is None:
        return embeds
    return embeds[:, second[0].bool()]  # its mask [1, L]


def empty_prompt(pipe: Any) -> Tensor:
    """Embeddings of "", with the warning that the source runs without a description.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError("source_prompt_embeds is None and the pipeline has no text encoder; pass source_prompt_embeds")
    notice_empty_prompt(stacklevel=5)
    return encode_prompt(pipe, "")


def notice_empty_prompt(stacklevel: int) -> None:
    """The warning that the source runs without a description."""
    text = 'no source prompt: the source runs with "" (a description of the source locks better)'
    warnings.warn(text, stacklevel=stacklevel)


def without_padding(embeds: Tensor) -> Tensor:
    """Without the zero rows at the end, which each run adds again at the length of its own prompt."""
    if embeds.ndim != 3:
        return embeds
    filled = embeds.ne(0).any(dim=2).any(dim=0).nonzero()
    return embeds[:, : int(filled.max()) + 1] if len(filled) else embeds[:, :1]
