"""From a pixel mask video to latent and token masks: which tokens an edit locks and where it measures and guides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock.geometry import Geometry, check_multiple, latent_frames, legal_frames, transformer_of

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def binarize(mask: Tensor) -> Tensor:
    """Threshold a mask video at one half: bool [F, H, W], True = edit.

    A value counts as masked when it is above 0.5 (uint8: 128 and more), exactly where VACE draws the line.

    Args:
        mask: [F, H, W], [1, F, H, W] or [F, 1, H, W], or five axes with batch and channel of length 1; bool, uint8 in
            0..255, or floating point in 0..1.

    Raises:
        ValueError: another dtype or shape, an empty video, values outside the range, or a uint8 mask of zeros and ones.
    """
    wanted = "wanted a tensor of bool, uint8 in 0..255 or floating point in 0..1"
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask is a {type(mask).__name__}; {wanted}")
    if mask.dtype not in (torch.bool, torch.uint8) and mask.dtype not in _FLOATING:
        raise ValueError(f"mask has dtype {mask.dtype}; {wanted}")
    frames = _as_frames(mask)
    if frames.numel() == 0:
        raise ValueError(f"mask is empty: its shape is {list(mask.shape)}; wanted at least one pixel")
    if frames.dtype == torch.bool:
        return frames.clone()
    if frames.dtype == torch.uint8:
        if frames.max() == 1:
            raise ValueError("mask is uint8 with largest value 1; wanted 0..255, or a bool mask for zeros and ones")
        return frames > 127
    # Written as "not all inside", so that NaN is refused as well.
    if not bool(((frames >= 0) & (frames <= 1)).all()):
        low, high = float(frames.min()), float(frames.max())
        raise ValueError(f"mask has floating point values from {low:g} to {high:g}; wanted 0..1")
    return frames > 0.5


def _as_frames(mask: Tensor) -> Tensor:
    shape = list(mask.shape)
    if mask.ndim == 5 and shape[0] == shape[1] == 1:
        return mask[0, 0]
    if mask.ndim == 5 and shape[0] == shape[2] == 1:
        return mask[0, :, 0]
    if mask.ndim == 4 and shape[0] == 1:
        return mask[0]
    if mask.ndim == 4 and shape[1] == 1:
        return mask[:, 0]
    if mask.ndim == 3:
        return mask
    raise ValueError(f"mask has shape {shape}; wanted [F, H, W], [1, F, H, W] or [F, 1, H, W] (one channel)")


def latent_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """Mask per latent (eqs. 4 and 5): bool [F, H, W] -> bool [T, h, w], True where any pixel of the latent is masked.

    In time the first frame stands alone and every later latent covers `temporal_stride` frames::

        frames   0 | 1 2 3 4 | 5 6 7 8 | ...        latents   0 | 1 | 2 | ...

    Raises:
        ValueError: F, H or W does not divide into whole latents.
    """
    steps = latent_frames(mask.shape[0], geometry.temporal_stride)
    pooled = _pool_space(mask, geometry)
    rest = pooled[1:].reshape(steps - 1, geometry.temporal_stride, *pooled.shape[1:])
    return torch.cat([pooled[:1], rest.any(dim=1)])


def vace_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """The latents VACE itself takes for masked: bool [F, H, W] -> bool [T, h, w], True where any pixel it reads is.

    VACE keeps every pixel of a latent as a channel but reads one frame per latent, ``floor((t + 1/2) * F / T)``, which
    for some t lies in the next latent's window.

    Raises:
        ValueError: F, H or W does not divide into whole latents.
    """
    num_frames = mask.shape[0]
    steps = latent_frames(num_frames, geometry.temporal_stride)
    looked_at = [(2 * t + 1) * num_frames // (2 * steps) for t in range(steps)]
    return _pool_space(mask[looked_at], geometry)


def _pool_space(mask: Tensor, geometry: Geometry) -> Tensor:
    stride = geometry.spatial_stride
    num_frames, height, width = mask.shape
    check_multiple("mask height", height, stride)
    check_multiple("mask width", width, stride)
    return mask.reshape(num_frames, height // stride, stride, width // stride, stride).any(dim=4).any(dim=2)


def token_mask(latent: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Mask per token (eq. 6): bool [T, h, w] -> bool [T/pt, h/ph, w/pw], True where any latent of the patch is masked.

    Raises:
        ValueError: a side of the latent is not a multiple of the patch.
    """
    for name, size, side in zip(("latent frames", "latent height", "latent width"), latent.shape, patch, strict=True):
        check_multiple(name, size, side)
    (frames, height, width), (pt, ph, pw) = latent.shape, patch
    patches = latent.reshape(frames // pt, pt, height // ph, ph, width // pw, pw)
    return patches.any(dim=5).any(dim=3).any(dim=1)


def dilate(tokens: Tensor, steps: int) -> Tensor:
    """Grow a token mask [T, gh, gw] by `steps` tokens to every side and corner of the same frame, never through time.

    Raises:
        ValueError: `steps` is not an int >= 0.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"dilate_tokens={steps!r} is not allowed; wanted an int >= 0")
    # One square of side 2n+1 is what n rounds of 3x3 give.
    grown = F.max_pool2d(tokens[:, None].float(), kernel_size=2 * steps + 1, stride=1, padding=steps)
    return grown[:, 0] > 0


@dataclass(frozen=True, eq=False)
class Masks:
    """All masks of one edit, from one pixel mask; T counts its latent frames, R the reference frames in front of them.

    Attributes:
        tokens: bool [T/pt, gh, gw], True = edit, dilated; without reference frames.
        latent: fp32 [1, 1, R+T, h, w], 1 = inside (guided as the edit); not dilated; reference frames are 1.
        weight: fp32 [1, 1, R+T, h, w], 1 = measured by the variance: `latent` with reference frames 0.
        index: int32 [rows], the rows to lock, ascending, in the flattened token grid ((R+T)/pt, gh, gw); never a
            reference token.
        reference_frames: R.
        dilate_tokens: by how many tokens the edit was grown.
        geometry: strides and patch the masks were made with.
    """

    tokens: Tensor
    latent: Tensor
    weight: Tensor
    index: Tensor
    reference_frames: int
    dilate_tokens: int
    geometry: Geometry

    @classmethod
    def from_pixels(
        cls,
        mask: Tensor,
        pipe: Any,
        *,
        reference_frames: int = 0,
        dilate_tokens: int = 1,
        vace: bool | None = None,
        trim: bool = False,
    ) -> Masks:
        """Masks for an edit with `pipe`, whose VAE and transformer give the geometry; the rest is `build`.

        Args:
            vace: also mark what VACE samples as masked; None asks whether the transformer has VACE layers.

        Raises:
            ValueError: as `build` and `Geometry.of`.
        """
        if vace is None:
            config = getattr(transformer_of(pipe), "config", None)
            vace = getattr(config, "vace_layers", None) is not None
        return cls.build(
            mask,
            Geometry.of(pipe),
            reference_frames=reference_frames,
            dilate_tokens=dilate_tokens,
            vace=vace,
            trim=trim,
        )

    @classmethod
    def build(
        cls,
        mask: Tensor,
        geometry: Geometry,
        *,
        reference_frames: int = 0,
        dilate_tokens: int = 1,
        vace: bool = False,
        trim: bool = False,
    ) -> Masks:
        """Masks for an edit of the given geometry.

        Args:
            mask: mask video as `binarize` takes it, at the size of the edit, white = edit.
            geometry: VAE strides and patch.
            reference_frames: latent frames the pipeline puts in front of the video (one for each reference image).
            dilate_tokens: tokens the edit grows to every side before the rest is locked.
            vace: also mark what VACE samples as masked, so that nothing it regenerates is locked.
            trim: drop trailing frames down to a legal count instead of refusing the mask; nothing is ever resampled.

        Raises:
            ValueError: the mask is malformed, does not divide into whole tokens, marks nothing (nothing to edit) or
                everything (nothing to lock), or leaves no token to lock once it is dilated.
        """
        if isinstance(reference_frames, bool) or not isinstance(reference_frames, int) or reference_frames < 0:
            raise ValueError(f"reference_frames={reference_frames!r} is not allowed; wanted an int >= 0")
        _check_reference_patch(reference_frames, geometry.patch[0])
        pixels = binarize(mask)
        if trim:
            pixels = pixels[: legal_frames(len(pixels), geometry.temporal_stride)]
        for name, size, base in zip(("height", "width"), pixels.shape[1:], geometry.pixels_per_token, strict=True):
            check_multiple(f"mask {name}", size, base)
        if not bool(pixels.any()):
            raise ValueError("nothing to edit: no pixel of the mask is set (white, above one half)")
        if bool(pixels.all()):
            raise ValueError("nothing to lock: every pixel of the mask is set; the lock needs a background")

        inside = latent_mask(pixels, geometry)
        if vace:
            inside |= vace_mask(pixels, geometry)
        touched = token_mask(inside, geometry.patch)
        tokens = dilate(touched, dilate_tokens)
        if bool(tokens.all()):
            raise ValueError(_nothing_left(touched, dilate_tokens))

        # Reference frames stand in front on the time axis: guided like the edit, never measured, never locked.
        prefix = torch.ones(reference_frames, *inside.shape[1:], dtype=torch.bool, device=inside.device)
        return cls(
            tokens=tokens,
            latent=torch.cat([prefix, inside]).float()[None, None],
            weight=torch.cat([~prefix, inside]).float()[None, None],
            index=_background_index(tokens, reference_frames // geometry.patch[0]),
            reference_frames=reference_frames,
            dilate_tokens=dilate_tokens,
            geometry=geometry,
        )

    @property
    def num_tokens(self) -> int:
        """Number of video tokens the transformer sees, reference frames included."""
        return self.tokens.numel() + self.reference_frames // self.geometry.patch[0] * self.tokens[0].numel()

    @property
    def background_rows(self) -> int:
        """Number of locked tokens."""
        return self.index.numel()

    @property
    def background_share(self) -> float:
        """Locked tokens over the tokens of the video, reference frames left out; in (0, 1)."""
        return self.background_rows / self.tokens.numel()

    @property
    def global_weight(self) -> Tensor:
        """fp32 [1, 1, R+T, h, w]: 1 on every frame of the video, 0 on reference frames (variance without the mask)."""
        everywhere = torch.ones_like(self.weight)
        everywhere[:, :, : self.reference_frames] = 0
        return everywhere

    def pixels(self) -> Tensor:
        """The pixels of locked tokens: bool [F, H, W], True = locked, for an overlay on the source video."""
        pt, ph, pw = self.geometry.patch
        locked = (~self.tokens).repeat_interleave(pt, dim=0)
        rest = locked[1:].repeat_interleave(self.geometry.temporal_stride, dim=0)
        frames = torch.cat([locked[:1], rest])
        side = self.geometry.spatial_stride
        return frames.repeat_interleave(side * ph, dim=1).repeat_interleave(side * pw, dim=2)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks with every tensor on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "latent", "weight", "index")}
        return replace(self, **moved)


def _check_reference_patch(reference_frames: int, patch_frames: int) -> None:
    if reference_frames % patch_frames:
        raise ValueError(
            f"reference_frames={reference_frames} do not divide into patches of {patch_frames} latent frames; "
            f"wanted a multiple of {patch_frames}"
        )


def _nothing_left(touched: Tensor, dilate_tokens: int) -> str:
    free = int((~touched).sum())
    total = touched.numel()
    if free == 0:
        return f"nothing to lock: the mask touches all {total} tokens even before dilation; wanted a smaller mask"
    return (
        f"nothing left to lock: dilation by {dilate_tokens} took the last {free} of {total} tokens; "
        "wanted a smaller mask, less dilation or a larger picture"
    )


def _background_index(tokens: Tensor, reference_slots: int) -> Tensor:
    rows = (~tokens).reshape(-1).nonzero()[:, 0] + reference_slots * tokens[0].numel()
    return rows.to(torch.int32)
