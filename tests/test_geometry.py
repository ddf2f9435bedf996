"""Tests of the sizes of latents and tokens, read from a pipeline."""

from types import SimpleNamespace

import pytest
import tiny
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLLTXVideo, AutoencoderKLWan

from kvlock.geometry import Geometry


def patchified():
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        scale_factor_spatial=16,
    )


def _vae(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


def _pipe(vae, **transformer):
    return SimpleNamespace(vae=vae, transformer=SimpleNamespace(config=SimpleNamespace(**transformer)))


SMALL = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}


@pytest.mark.parametrize(
    ("make_vae", "transformer", "expected"),
    [
        (tiny.vae, {"patch_size": (1, 2, 2)}, Geometry(4, 8)),
        (patchified, {"patch_size": [1, 2, 2]}, Geometry(4, 16)),
        (
            lambda: AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), **SMALL),
            {"patch_size": 2, "patch_size_t": None},
            Geometry(4, 8, (1, 2, 2)),
        ),
        (
            lambda: AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), **SMALL),
            {"patch_size": 2, "patch_size_t": 2},
            Geometry(4, 8, (2, 2, 2)),
        ),
        (
            lambda: AutoencoderKLLTXVideo(block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4)),
            {"patch_size": 1, "patch_size_t": 1},
            Geometry(8, 32, (1, 1, 1)),
        ),
    ],
    ids=["wan", "wan-patchified", "cogvideox", "cogvideox-1.5", "ltx"],
)
def test_the_geometry_is_read_from_the_vae_and_the_patch(make_vae, transformer, expected):
    assert Geometry.of(_pipe(make_vae(), **transformer)) == expected


def test_the_second_transformer_stands_in_for_a_missing_first():
    second = SimpleNamespace(config=SimpleNamespace(patch_size=2))
    pipe = SimpleNamespace(vae=tiny.vae(), transformer=None, transformer_2=second)
    assert Geometry.of(pipe) == Geometry(4, 8)


@pytest.mark.parametrize(
    ("pipe", "reason"),
    [
        (SimpleNamespace(), r"SimpleNamespace has no VAE \(pipe.vae\)"),
        (SimpleNamespace(vae=_vae()), "has no transformer"),
        (_pipe(_vae(), patch_size=2), "strides of SimpleNamespace are unknown"),
        (_pipe(_vae(scale_factor_temporal=4), patch_size=2), "strides .* are unknown"),
        (
            _pipe(_vae(scale_factor_temporal=4, scale_factor_spatial=8), patch_size=(2, 2)),
            r"patch_size=\(2, 2\); wanted an int or three ints",
        ),
    ],
    ids=["no-vae", "no-transformer", "no-strides", "one-stride", "two-sided-patch"],
)
def test_an_unknown_geometry_is_refused(pipe, reason):
    with pytest.raises(ValueError, match=reason):
        Geometry.of(pipe)


@pytest.mark.parametrize("sizes", [(0, 8), (4, -8), (4, 8.0), (True, 8), (4, 8, (1, 2)), (4, 8, (1, 0, 2)), (4, 8, 2)])
def test_a_geometry_without_positive_sides_is_refused(sizes):
    with pytest.raises(ValueError, match=r"stride=|patch"):
        Geometry(*sizes)
