"""Still pictures from files: every pixel as it was stored, or a refusal that says why not."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_picture(path: str | os.PathLike[str], *, background: str | None = None) -> Tensor:
    """Read one picture, turned upright as its EXIF says: uint8 [H, W, 3], RGB.

    Args:
        background: colour to lay behind transparent parts; None refuses them, because the colour stored under them is
            seen nowhere else.

    Raises:
        ValueError: the file is no picture, is an animation, has more than 8 bits a channel, is too large to be
            opened safely, or is transparent in parts without a `background`.
    """
    try:
        with Image.open(path) as image:
            # A JPEG of several pictures is a photograph with its previews, not an animation.
            count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            is_deep = image.mode.startswith(("I", "F")) or any("16B" in str(tile) for tile in image.tile)
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # a broken file raises whatever the decoder ran into
        raise ValueError(f"cannot read {path} as a picture: {error}") from error
    if count > 1:
        raise ValueError(f"{path} is an animation of {count} pictures; wanted one, a folder of them or a video")
    if is_deep:
        raise ValueError(f"{path} has more than 8 bits a channel; wanted an 8-bit picture")
    opaque = upright.convert("RGBA") if background is None else laid_on(background, upright)
    pixels = torch.from_numpy(np.array(opaque))
    if bool((pixels[..., 3] < 255).any()):
        raise ValueError(f"{path} is transparent in parts; wanted an opaque picture (a mask is white on black)")
    return pixels[..., :3].contiguous()


def laid_on(colour: str, image: Image.Image) -> Image.Image:
    """The picture with a colour behind its transparent parts, RGBA."""
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))
