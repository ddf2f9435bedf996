"""How far an edit left its background alone, measured over background pixels only."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIGMA = 1.5  # pixels, with the 11x11 window and the constants of Wang et al. 2004
SSIM_RADIUS = 5
SSIM_K1, SSIM_K2 = 0.01, 0.03


class BackgroundReport(NamedTuple):
    """How an edit differs from its source, outside and inside the mask; pixel values count from 0 to 1."""

    psnr: float  # dB over the background pixels alone; inf where they are equal
    ssim: float  # -1..1, mean over the background eroded by SSIM_RADIUS; nan where nothing is left of it
    psnr_zero_filled: float  # dB over the whole picture with the mask set to zero, as some papers count; flatters
    background_share: float  # pixels outside the mask over all pixels
    change_inside: float  # mean absolute difference inside the mask: doing nothing scores 0
    psnr_inside: float  # dB inside the mask; low is a strong change

    def to_dict(self) -> dict[str, float | str | None]:
        """The measures as JSON types, which know neither infinity ("inf") nor nan (None)."""
        return {name: _json_number(value) for name, value in self._asdict().items()}


def background_report(
    source: Tensor,  # [F, H, W, 3], uint8 or floating point in 0..1
    edit: Tensor,  # [F, H, W, 3], uint8 or floating point in 0..1
    mask: Tensor,  # bool [F, H, W], True = edit
) -> BackgroundReport:
    """Measure an edit against its source.

    ``PSNR = 10 log10(1 / mean (source - edit)^2)`` over the pixels of one side of the mask and the three channels. With
    a background share s, the zero-filled variant is ``PSNR + 10 log10(1 / s)``: it says more of the mask than of the
    edit. Comparing the source with its own round trip through the VAE gives the best PSNR any edit can reach.

    Raises:
        ValueError: the shapes differ, the mask is not bool, or it leaves one of its sides empty.
    """
    if source.ndim != 4 or source.shape[3] != 3:
        raise ValueError(f"source has shape {list(source.shape)}; wanted [F, H, W, 3]")
    if edit.shape != source.shape:
        raise ValueError(f"edit has shape {list(edit.shape)}; wanted {list(source.shape)} as the source")
    if mask.shape != source.shape[:3] or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; wanted torch.bool {list(source.shape[:3])}")
    inside = int(mask.sum())
    outside = mask.numel() - inside
    if not inside or not outside:
        raise ValueError(f"the mask marks {inside} of {mask.numel()} pixels; wanted some on either side")

    squared_out = squared_in = absolute_in = similarity = 0.0
    measured = 0
    for left, right, marked in zip(source, edit, mask, strict=True):  # frame by frame: a video in float64 is large
        a, b = _to_float64(left), _to_float64(right)
        difference = a - b
        squared_out += float((difference[~marked] ** 2).sum())
        squared_in += float((difference[marked] ** 2).sum())
        absolute_in += float(difference[marked].abs().sum())
        clean = _eroded(~marked, SSIM_RADIUS)
        if bool(clean.any()):
            similarity += float(ssim_map(a, b)[clean].sum())
            measured += int(clean.sum())
    return BackgroundReport(
        psnr=psnr(squared_out / (3 * outside)),
        ssim=similarity / (3 * measured) if measured else math.nan,
        psnr_zero_filled=psnr(squared_out / (3 * mask.numel())),
        background_share=outside / mask.numel(),
        change_inside=absolute_in / (3 * inside),
        psnr_inside=psnr(squared_in / (3 * inside)),
    )


def ssim_map(
    a: Tensor,  # floating point [H, W, C] in 0..1
    b: Tensor,  # the same
) -> Tensor:  # [H - 10, W - 10, C]
    """Structural similarity around every pixel whose 11x11 window lies inside the picture, for each channel.

    ``(2 ma mb + c1)(2 cov + c2) / ((ma^2 + mb^2 + c1)(va + vb + c2))`` with Gaussian-weighted moments, ``c = (K L)^2``,
    L = 1. A picture smaller than the window gives an empty map.
    """
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    if min(a.shape[0], a.shape[1]) <= 2 * SSIM_RADIUS:
        return a.new_empty(max(0, a.shape[0] - 2 * SSIM_RADIUS), max(0, a.shape[1] - 2 * SSIM_RADIUS), a.shape[2])
    mean_a, mean_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]))
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _blur(pictures: Tensor) -> Tensor:
    """Gaussian means of [M, H, W, C] where the window fits: [M, H - 10, W - 10, C]."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=pictures.dtype, device=pictures.device)
    weight = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weight = weight / weight.sum()
    planes = pictures.movedim(-1, 1)  # [M, C, H, W]
    flat = planes.reshape(-1, 1, *planes.shape[2:])
    flat = F.conv2d(F.conv2d(flat, weight[None, None, :, None]), weight[None, None, None, :])
    return flat.reshape(*planes.shape[:2], *flat.shape[2:]).movedim(1, -1)


def _eroded(background: Tensor, radius: int) -> Tensor:
    """Pixels whose whole window is background and inside the picture: bool [H, W] -> [H - 2r, W - 2r]."""
    if min(background.shape) <= 2 * radius:
        return background.new_empty(0, 0)
    return F.max_pool2d((~background).float()[None], 2 * radius + 1, stride=1)[0] == 0


def _to_float64(frame: Tensor) -> Tensor:
    return frame.double() / 255 if frame.dtype == torch.uint8 else frame.double()


def psnr(mean_squared: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error between values in [0, 1]; infinite where it is 0."""
    return math.inf if mean_squared == 0 else -10 * math.log10(mean_squared)


def _json_number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
