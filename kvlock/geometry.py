"""How pixels, latents and tokens divide: the strides of the VAE and the patch of the transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """How many pixels a latent and a token span: VAE strides and the transformer's patch (time, height, width).

    Raises:
        ValueError: a stride or a patch side is not a positive int, or the patch has not three sides.
    """

    temporal_stride: int
    spatial_stride: int
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if not isinstance(self.patch, tuple | list) or len(self.patch) != 3:
            raise ValueError(f"patch={self.patch!r} is not allowed; wanted three sides (time, height, width)")
        object.__setattr__(self, "patch", tuple(self.patch))
        for name, value in (
            ("temporal_stride", self.temporal_stride),
            ("spatial_stride", self.spatial_stride),
            *(("a side of patch", side) for side in self.patch),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed; wanted an int >= 1")

    @classmethod
    def of(cls, pipe: Any) -> Geometry:
        """Read the geometry of a pipeline from ``pipe.vae`` and ``pipe.transformer`` (or ``transformer_2``).

        The VAE's configuration decides, never the pipeline's own attributes: some pipelines count downsampling levels
        and miss the pixels a patchified VAE folds into channels.

        Raises:
            ValueError: the VAE or the transformer is missing, or does not say its stride or patch.
        """
        vae = getattr(pipe, "vae", None)
        transformer = transformer_of(pipe)
        if vae is None or transformer is None:
            missing = "VAE (pipe.vae)" if vae is None else "transformer (pipe.transformer)"
            raise ValueError(f"{type(pipe).__name__} has no {missing}; the masks are made from its sizes")
        temporal, spatial = _vae_strides(vae)
        return cls(temporal, spatial, patch_of(transformer.config))

    @property
    def pixels_per_token(self) -> tuple[int, int]:
        """Height and width of a token in pixels."""
        return self.spatial_stride * self.patch[1], self.spatial_stride * self.patch[2]


def transformer_of(pipe: Any) -> Any:
    """The pipeline's first transformer, or None."""
    first = getattr(pipe, "transformer", None)
    return first if first is not None else getattr(pipe, "transformer_2", None)


def _vae_strides(vae: Any) -> tuple[int, int]:
    temporal = _named_int(vae, "scale_factor_temporal", "temporal_compression_ratio")
    spatial = _named_int(vae, "scale_factor_spatial", "spatial_compression_ratio")
    halvings = getattr(vae.config, "spatio_temporal_scaling", None)
    if halvings:  # LTX's VAE, whose config may leave the ratios to the class
        temporal = temporal or vae.config.patch_size_t * 2 ** sum(halvings)
        spatial = spatial or vae.config.patch_size * 2 ** sum(halvings)
    levels = getattr(vae.config, "block_out_channels", None)
    if spatial is None and levels:
        spatial = 2 ** (len(levels) - 1)  # CogVideoX's VAE names no spatial ratio; it halves the picture between levels
    if temporal is None or spatial is None:
        raise ValueError(
            f"the strides of {type(vae).__name__} are unknown; wanted scale_factor_temporal and scale_factor_spatial "
            "(or temporal_compression_ratio and spatial_compression_ratio) in its config"
        )
    return temporal, spatial


def _named_int(vae: Any, *names: str) -> int | None:
    for owner in (vae.config, vae):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def patch_of(transformer_config: Any) -> tuple[int, int, int]:
    """The sides of a transformer's patch in latents (time, height, width), read from its config.

    Raises:
        ValueError: the config does not say.
    """
    size = getattr(transformer_config, "patch_size", None)
    if isinstance(size, int):
        return getattr(transformer_config, "patch_size_t", None) or 1, size, size
    if isinstance(size, tuple | list) and len(size) == 3:
        return size[0], size[1], size[2]
    name = getattr(transformer_config, "_class_name", "the transformer")
    raise ValueError(f"the config of {name} has patch_size={size!r}; wanted an int or three ints")


def legal_frames(num_frames: int, temporal_stride: int) -> int:
    """The largest count of the form stride * n + 1 that is not above `num_frames` (>= 1)."""
    return 1 + (num_frames - 1) // temporal_stride * temporal_stride


def latent_frames(num_frames: int, temporal_stride: int = 4) -> int:
    """Number of latent frames T = 1 + (F - 1) / stride of a video of F frames, whose first frame stands alone.

    Raises:
        ValueError: F is not a multiple of the stride plus 1; the message names the two nearest counts that are.
    """
    if num_frames < 1 or (num_frames - 1) % temporal_stride:
        below = legal_frames(max(1, num_frames), temporal_stride)
        raise ValueError(
            f"{num_frames} frames do not fit {temporal_stride}n+1; "
            f"the nearest counts that do are {below} and {below + temporal_stride}"
        )
    return 1 + (num_frames - 1) // temporal_stride


def check_multiple(name: str, value: int, base: int) -> None:
    """Refuse a size that does not divide into whole units of `base`.

    Raises:
        ValueError: names the nearest sizes that do.
    """
    if value < base or value % base:
        below = max(1, value // base) * base
        raise ValueError(f"{name} is {value}; wanted a multiple of {base}, such as {below} or {below + base}")
