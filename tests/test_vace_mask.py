"""Tests of the mask that VACE samples for itself, and of its union with the edit's."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import WanVACEPipeline

from kvlock.geometry import Geometry
from kvlock.masks import Masks, latent_mask, token_mask, vace_mask

WAN = Geometry(4, 8)


def blank(num_frames=17):
    return torch.zeros(num_frames, 96, 128, dtype=torch.bool)


def box(num_frames=17):
    mask = blank(num_frames)
    mask[:, 32:56, 40:72] = True
    return mask


@pytest.fixture(scope="module")
def vace_pipe():
    return tiny.pipeline(WanVACEPipeline)


@pytest.mark.parametrize("num_frames", [1, 5, 17, 21, 81])
def test_vace_mask_is_what_the_pipeline_gives_its_model(vace_pipe, num_frames):
    for seed in range(4):
        mask = torch.rand(num_frames, 96, 128, generator=torch.Generator().manual_seed(seed)) > 0.99
        video = mask.float()[None, None].expand(1, 3, -1, -1, -1).contiguous()
        seen = vace_pipe.prepare_masks(video, [[]])[0].amax(dim=0) > 0
        assert torch.equal(vace_mask(mask, WAN), seen)


def test_vace_mask_follows_a_patchified_vae(vace_pipe, monkeypatch):
    monkeypatch.setattr(vace_pipe, "vae_scale_factor_spatial", 16)
    mask = torch.rand(17, 96, 128, generator=torch.Generator().manual_seed(0)) > 0.99
    video = mask.float()[None, None].expand(1, 3, -1, -1, -1).contiguous()
    seen = vace_pipe.prepare_masks(video, [[]])[0].amax(dim=0) > 0
    assert torch.equal(vace_mask(mask, Geometry(4, 16)), seen)


def test_vace_reads_a_frame_of_the_next_window():
    mask = blank()
    mask[5, 0, 0] = True  # frame 5 belongs to latent 2
    assert vace_mask(mask, WAN).nonzero().tolist() == [[1, 0, 0]]
    assert latent_mask(mask, WAN).nonzero().tolist() == [[2, 0, 0]]


def test_masks_for_vace_never_lock_what_either_mask_marks(vace_pipe):
    mask = box()
    mask[5, 0, 0] = True
    masks = Masks.from_pixels(mask, vace_pipe, dilate_tokens=0)
    union = latent_mask(mask, WAN) | vace_mask(mask, WAN)
    assert torch.equal(masks.latent[0, 0].bool(), union)
    assert masks.tokens[1, 0, 0]
    assert masks.tokens[2, 0, 0]
    assert torch.equal(masks.tokens, token_mask(union, WAN.patch))


def test_the_union_is_taken_for_vace_transformers_or_when_asked(vace_pipe):
    mask = box()
    mask[5, 0, 0] = True
    plain = SimpleNamespace(vae=vace_pipe.vae, transformer=tiny.transformer())
    assert not Masks.from_pixels(mask, plain, dilate_tokens=0).tokens[1, 0, 0]
    assert Masks.from_pixels(mask, plain, dilate_tokens=0, vace=True).tokens[1, 0, 0]
    assert not Masks.from_pixels(mask, vace_pipe, dilate_tokens=0, vace=False).tokens[1, 0, 0]


def test_masks_for_a_pipeline_are_the_masks_of_its_geometry(vace_pipe):
    settings = {"reference_frames": 2, "dilate_tokens": 2, "trim": True}
    for_pipe = Masks.from_pixels(box(num_frames=18), vace_pipe, **settings)
    built = Masks.build(box(num_frames=18), WAN, vace=True, **settings)
    assert (for_pipe.reference_frames, for_pipe.geometry) == (2, WAN)
    for name in ("tokens", "latent", "weight", "index"):
        assert torch.equal(getattr(for_pipe, name), getattr(built, name))
