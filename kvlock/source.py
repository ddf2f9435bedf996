"""What a session knows of its source: masks, latents and prompt, on the device of the run."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock.masks import Masks


class Source:
    """The source of an edit: copies, for callers may go on with tensors of their own.

    Attributes:
        masks: what of it is locked.
        latents: [1 or B, C, T, h, w] fp32.
    """

    def __init__(self, masks: Masks, latents: Tensor, prompt_embeds: Tensor | None) -> None:
        self.masks = copy.deepcopy(masks)
        self.latents = latents.detach().to(torch.float32, copy=True)
        self._embeds = None if prompt_embeds is None else prompt_embeds.detach().clone()
        self._device: torch.device | None = None  # where they all are
        self._padded: Tensor | None = None  # the prompt, as that of the latest call is: dtype and length

    def move(self, device: torch.device) -> None:
        """Go to the device of a run, which waits for the copies."""
        if device == self._device:
            return
        self.masks, self.latents = self.masks.to(device), self.latents.to(device)
        if self._embeds is not None:
            self._embeds, self._padded = self._embeds.to(device), None
        self._device = device

    def prompt(self, prompt: Tensor, batch: int) -> Tensor:
        """The source prompt's embeddings [batch, L, C], in the dtype and length of the edit's `prompt` [B, L, C].

        Shorter ones are padded with zeros, as Wan pipelines pad: their `encode_prompt` and their call differ in length.

        Raises:
            ValueError: there are none, or they are longer or of other channels or samples.
        """
        embeds = self._embeds
        if embeds is None:
            raise ValueError("the lock needs source_prompt_embeds and has none; pass them to attach")
        fits = embeds.ndim == 3 and len(embeds) in (1, batch) and embeds.shape[2] == prompt.shape[2]
        if not fits or embeds.shape[1] > prompt.shape[1]:
            raise ValueError(
                f"source_prompt_embeds has shape {list(embeds.shape)}; "
                f"wanted [1 or B, {prompt.shape[1]} or fewer, {prompt.shape[2]}] as the prompt has"
            )
        padded = self._padded
        if padded is None or padded.dtype != prompt.dtype or padded.shape[1] != prompt.shape[1]:
            padded = F.pad(embeds.to(prompt.dtype), (0, 0, 0, prompt.shape[1] - embeds.shape[1]))
        self._padded = padded
        return padded.expand(batch, -1, -1)

    def prompt_mask(self, mask: Tensor, batch: int) -> Tensor:
        """As `mask` [B, L] marks the prompt's tokens: those of `prompt` in front of its padding, [batch, L]."""
        assert self._embeds is not None
        marked = torch.zeros_like(mask[:1])
        marked[:, : self._embeds.shape[1]] = 1
        return marked.expand(batch, -1)
