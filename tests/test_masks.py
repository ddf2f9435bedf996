"""Tests of the way from a pixel mask to locked tokens."""


import pytest
import torch
from diffusers import (
    WanTransformer3DModel,
)

from kvlock.geometry import Geometry, latent_frames
from kvlock.masks import Masks, binarize, dilate, latent_mask, token_mask, vace_mask

WAN = Geometry(4, 8)
GEOMETRIES = {
    "stride8-patch122": WAN,
    "stride16-patch122": Geometry(4, 16),
    "stride8-patch111": Geometry(4, 8, (1, 1, 1)),
    "stride8-patch222": Geometry(4, 8, (2, 2, 2)),
}
WAN_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "ffn_dim": 32,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def blank(num_frames=17, height=96, width=128):
    return torch.zeros(num_frames, height, width, dtype=torch.bool)


def box(num_frames=17, height=96, width=128):
    mask = blank(num_frames, height, width)
    mask[:, 32:56, 40:72] = True
    return mask


# Pixel mask to latent to token


@pytest.mark.parametrize(("frame", "slot"), [(0, 0), (1, 1), (4, 1), (5, 2), (-1, 5)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_pixel_marks_one_latent_and_one_token(name, frame, slot):
    geometry = GEOMETRIES[name]
    (pt, ph, pw), stride = geometry.patch, geometry.spatial_stride
    mask = blank(num_frames=21)
    mask[frame, 47, 95] = True
    latent = latent_mask(mask, geometry)
    assert latent.shape == (6, 96 // stride, 128 // stride)
    assert latent.nonzero().tolist() == [[slot, 47 // stride, 95 // stride]]
    tokens = token_mask(latent, geometry.patch)
    assert tokens.shape == (6 // pt, 96 // stride // ph, 128 // stride // pw)
    assert tokens.nonzero().tolist() == [[slot // pt, 47 // (stride * ph), 95 // (stride * pw)]]


def test_a_mask_that_crosses_a_window_edge_marks_both_latents():
    mask = blank()
    mask[4:6, 10, 10] = True
    assert latent_mask(mask, WAN).any(dim=(1, 2)).tolist() == [False, True, True, False, False]


def test_a_mask_that_crosses_a_token_edge_marks_both_tokens():
    mask = blank()
    mask[0, 0, 15:17] = True
    assert token_mask(latent_mask(mask, WAN), WAN.patch).nonzero().tolist() == [[0, 0, 0], [0, 0, 1]]


def test_every_masked_pixel_lies_in_a_marked_token():
    mask = torch.rand(17, 96, 128, generator=torch.Generator().manual_seed(0)) > 0.9995
    masks = Masks.build(mask, WAN, dilate_tokens=0)
    assert 0 < masks.background_rows < masks.num_tokens
    assert not (masks.pixels() & mask).any()


@pytest.mark.parametrize("num_frames", [1, 5, 81])
def test_legal_frame_counts_give_latent_frames(num_frames):
    assert latent_frames(num_frames) == {1: 1, 5: 2, 81: 21}[num_frames]
    assert latent_frames(8 * 3 + 1, 8) == 4


@pytest.mark.parametrize(
    ("num_frames", "below", "above"), [(80, 77, 81), (82, 81, 85), (2, 1, 5), (0, 1, 5), (-7, 1, 5)]
)
def test_an_illegal_frame_count_is_refused_with_the_two_nearest(num_frames, below, above):
    with pytest.raises(ValueError, match=rf"{num_frames} frames do not fit 4n\+1; .* {below} and {above}$"):
        latent_frames(num_frames)


def test_trailing_frames_are_dropped_only_when_asked():
    mask = box(num_frames=19)
    with pytest.raises(ValueError, match="19 frames"):
        Masks.build(mask, WAN)
    trimmed = Masks.build(mask, WAN, trim=True)
    assert trimmed.pixels().shape[0] == 17
    assert torch.equal(trimmed.tokens, Masks.build(mask[:17], WAN).tokens)
    assert torch.equal(Masks.build(mask[:17], WAN, trim=True).index, Masks.build(mask[:17], WAN).index)


# Values and shapes of the pixel mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([0, 127, 128, 255], dtype=torch.uint8), [False, False, True, True]),
        (torch.tensor([0.0, 0.5, 0.5001, 1.0]), [False, False, True, True]),
        (torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.bfloat16), [False, False, True, True]),
        (torch.tensor([False, True]), [False, True]),
    ],
    ids=["uint8", "fp32", "bf16", "bool"],
)
def test_a_pixel_is_masked_above_one_half(mask, expected):
    assert binarize(mask.reshape(1, 1, -1)).flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(1, 5, 8, 8), (5, 1, 8, 8), (1, 1, 5, 8, 8), (1, 5, 1, 8, 8)], ids=str)
def test_axes_of_length_one_are_dropped(shape):
    mask = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(binarize(mask.reshape(shape)), mask > 0.5)


def test_binarizing_does_not_share_memory_with_its_input():
    mask = blank(1, 8, 8)
    binarize(mask)[0, 0, 0] = True
    assert not mask.any()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.zeros(8, 8), r"shape \[8, 8\]"),
        (torch.zeros(5, 3, 8, 8), r"shape \[5, 3, 8, 8\]; wanted .*one channel"),
        (torch.zeros(2, 1, 5, 8, 8), r"shape \[2, 1, 5, 8, 8\]"),
        (torch.zeros(0, 8, 8), "empty"),
        (torch.zeros(5, 8, 8, dtype=torch.int64), "dtype torch.int64; wanted a tensor of bool, uint8"),
        (torch.full((5, 8, 8), 255.0), "from 255 to 255; wanted 0..1"),
        (torch.full((5, 8, 8), -1.0), "from -1 to -1; wanted 0..1"),
        (torch.full((5, 8, 8), torch.nan), "from nan to nan; wanted 0..1"),
        (torch.ones(5, 8, 8, dtype=torch.uint8), "uint8 with largest value 1"),
        (torch.zeros(5, 8, 8).numpy(), "mask is a ndarray; wanted a tensor"),
        ([[[0.0]]], "mask is a list; wanted a tensor"),
    ],
    ids=["2d", "rgb", "batch", "empty", "int64", "0..255", "-1..1", "nan", "uint8-0-1", "numpy", "list"],
)
def test_a_mask_of_another_kind_is_refused(mask, reason):
    with pytest.raises(ValueError, match=reason):
        binarize(mask)


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (104, 128, "mask height is 104; wanted a multiple of 16, such as 96 or 112"),
        (96, 130, "mask width is 130; wanted a multiple of 16, such as 128 or 144"),
        (8, 128, "mask height is 8; wanted a multiple of 16, such as 16 or 32"),
    ],
)
def test_a_size_that_does_not_divide_into_tokens_is_refused(height, width, reason):
    with pytest.raises(ValueError, match=reason):
        Masks.build(torch.ones(5, height, width), WAN)


@pytest.mark.parametrize("pool", [latent_mask, vace_mask])
@pytest.mark.parametrize("shape", [(5, 96, 100), (5, 100, 96), (6, 96, 96)], ids=str)
def test_a_mask_that_does_not_divide_into_latents_is_refused(pool, shape):
    with pytest.raises(ValueError, match=r"mask height is 100|mask width is 100|6 frames"):
        pool(torch.zeros(shape, dtype=torch.bool), WAN)


def test_latent_frames_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="latent frames is 5; wanted a multiple of 2, such as 4 or 6"):
        Masks.build(box(), Geometry(4, 8, (2, 2, 2)))


# What cannot be edited or locked


def test_an_empty_mask_is_refused_as_nothing_to_edit():
    with pytest.raises(ValueError, match="nothing to edit"):
        Masks.build(blank(), WAN)


def test_a_full_mask_is_refused_as_nothing_to_lock():
    with pytest.raises(ValueError, match="nothing to lock: every pixel"):
        Masks.build(~blank(), WAN)


def test_a_mask_that_touches_every_token_is_refused_as_nothing_to_lock():
    mask = ~blank()
    mask[:, ::16] = False
    with pytest.raises(ValueError, match="nothing to lock: the mask touches all 240 tokens even before dilation"):
        Masks.build(mask, WAN)


def test_a_mask_whose_dilation_covers_everything_is_refused_with_the_tokens_it_took():
    mask = ~blank(num_frames=5, height=32, width=32)
    mask[:, :16, :16] = False
    assert Masks.build(mask, WAN, dilate_tokens=0).background_rows == 2
    with pytest.raises(ValueError, match="nothing left to lock: dilation by 1 took the last 2 of 8 tokens"):
        Masks.build(mask, WAN, dilate_tokens=1)


# Dilation


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_dilation_grows_a_square_inside_its_own_frame(steps):
    tokens = torch.zeros(3, 7, 8, dtype=torch.bool)
    tokens[1, 3, 4] = True
    expected = torch.zeros_like(tokens)
    expected[1, 3 - steps : 4 + steps, 4 - steps : 5 + steps] = True
    assert torch.equal(dilate(tokens, steps), expected)


def test_dilation_by_two_is_dilation_by_one_twice_and_stops_at_the_border():
    tokens = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)) > 0.95
    tokens[0, 0, 0] = True
    assert torch.equal(dilate(tokens, 2), dilate(dilate(tokens, 1), 1))


@pytest.mark.parametrize("steps", [-1, 1.0, True])
def test_a_dilation_that_is_no_count_is_refused(steps):
    with pytest.raises(ValueError, match="dilate_tokens="):
        dilate(torch.zeros(1, 2, 2, dtype=torch.bool), steps)


def test_only_the_tokens_are_dilated_and_not_the_latent_mask():
    near, far = Masks.build(box(), WAN, dilate_tokens=0), Masks.build(box(), WAN, dilate_tokens=2)
    assert torch.equal(near.latent, far.latent)
    assert torch.equal(near.latent[0, 0].bool(), latent_mask(box(), WAN))
    assert far.background_rows < near.background_rows


# The rows to lock


@pytest.mark.parametrize("reference_frames", [0, 1, 3])
def test_the_index_names_the_background_rows_and_never_a_reference_token(reference_frames):
    masks = Masks.build(box(), WAN, reference_frames=reference_frames)
    grid = torch.cat([torch.ones(reference_frames, 6, 8, dtype=torch.bool), masks.tokens])
    assert masks.index.dtype == torch.int32
    assert masks.index.tolist() == (~grid).flatten().nonzero().flatten().tolist()
    assert masks.index.min() >= reference_frames * 48
    assert masks.num_tokens == grid.numel()
    assert masks.background_rows == len(masks.index) > 0
    assert masks.background_share == masks.background_rows / 240


@pytest.mark.parametrize("reference_frames", [0, 2])
def test_reference_frames_are_guided_like_the_edit_and_never_measured(reference_frames):
    masks = Masks.build(box(), WAN, reference_frames=reference_frames)
    alone = Masks.build(box(), WAN)
    for values in (masks.latent, masks.weight, masks.global_weight):
        assert values.dtype == torch.float32
        assert values.shape == (1, 1, reference_frames + 5, 12, 16)
    assert torch.equal(masks.tokens, alone.tokens)
    assert masks.latent[:, :, :reference_frames].eq(1).all()
    assert masks.weight[:, :, :reference_frames].eq(0).all()
    assert masks.global_weight[:, :, :reference_frames].eq(0).all()
    assert torch.equal(masks.latent[:, :, reference_frames:], alone.latent)
    assert torch.equal(masks.weight[:, :, reference_frames:], alone.latent)
    assert masks.global_weight[:, :, reference_frames:].eq(1).all()


@pytest.mark.parametrize("reference_frames", [-1, 1.0, True])
def test_reference_frames_that_are_no_count_are_refused(reference_frames):
    with pytest.raises(ValueError, match="reference_frames="):
        Masks.build(box(), WAN, reference_frames=reference_frames)


def test_reference_frames_fill_whole_temporal_patches():
    geometry = GEOMETRIES["stride8-patch222"]
    masks = Masks.build(box(num_frames=13), geometry, reference_frames=2)
    assert masks.num_tokens == (2 + 4) // 2 * 6 * 8
    assert torch.equal(masks.index, Masks.build(box(num_frames=13), geometry).index + 6 * 8)
    with pytest.raises(ValueError, match="reference_frames=1 do not divide into patches of 2"):
        Masks.build(box(num_frames=13), geometry, reference_frames=1)


def test_rows_are_counted_as_the_transformer_lays_out_its_tokens():
    transformer = WanTransformer3DModel(**WAN_SIZES, num_layers=1)
    masks = Masks.build(box(), WAN, reference_frames=1)
    latents = torch.randn(1, 16, 6, 12, 16, generator=torch.Generator().manual_seed(0))
    inside = masks.tokens.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    changed = latents.clone()
    changed[:, :, 0] += 1.0
    changed[:, :, 1:] += inside
    before, after = (transformer.patch_embedding(x).flatten(2).transpose(1, 2) for x in (latents, changed))
    kept = (before == after).all(dim=-1)[0]
    assert kept.nonzero().flatten().tolist() == masks.index.tolist()


@pytest.mark.parametrize("name", ["stride8-patch122", "stride16-patch122", "stride8-patch222"])
def test_the_overlay_shows_whole_locked_tokens(name):
    geometry = GEOMETRIES[name]
    masks = Masks.build(box(num_frames=13), geometry, dilate_tokens=0)
    locked = masks.pixels()
    assert locked.shape == (13, 96, 128)
    assert 0 < masks.background_rows == int((~masks.tokens).sum())
    expected = torch.zeros_like(locked)
    (pt, _, _), (height, width) = geometry.patch, geometry.pixels_per_token
    for t, y, x in (~masks.tokens).nonzero().tolist():
        for slot in range(pt * t, pt * t + pt):
            frames = slice(0, 1) if slot == 0 else slice(4 * slot - 3, 4 * slot + 1)
            expected[frames, y * height : (y + 1) * height, x * width : (x + 1) * width] = True
    assert torch.equal(locked, expected)


def test_a_single_frame_is_a_video_of_one_latent():
    masks = Masks.build(box(num_frames=1), WAN, vace=True)
    assert (masks.tokens.shape, masks.latent.shape) == ((1, 6, 8), (1, 1, 1, 12, 16))
    assert masks.pixels().shape == (1, 96, 128)
    assert 0 < masks.background_rows < 48


def test_moving_the_masks_moves_every_tensor():
    masks = Masks.build(box(), WAN, reference_frames=1).to("meta")
    assert {masks.tokens.device.type, masks.latent.device.type, masks.weight.device.type, masks.index.device.type} == {
        "meta"
    }
    assert masks.num_tokens == 6 * 48
