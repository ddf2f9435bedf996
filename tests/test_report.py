"""Tests of the background measures: each against a number worked out by hand or by a slower rule."""

import json
import math

import pytest
import torch

from kvlock.report import background_report, ssim_map


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def centre_box(num_frames=2, height=40, width=48):
    mask = torch.zeros(num_frames, height, width, dtype=torch.bool)
    mask[:, 16:24, 20:30] = True
    return mask


def test_an_even_background_error_of_a_tenth_is_twenty_decibels():
    source, mask = noise(2, 40, 48, 3).double() * 0.5, centre_box()
    edit = source + 0.1
    edit[mask] = source[mask] + 0.4
    report = background_report(source, edit, mask)
    assert report.psnr == pytest.approx(20.0)
    assert report.psnr_inside == pytest.approx(-20 * math.log10(0.4))
    assert report.change_inside == pytest.approx(0.4)
    assert report.background_share == pytest.approx(1 - 80 / 1920)


def test_the_zero_filled_variant_flatters_by_the_background_share():
    source, mask = noise(2, 40, 48, 3), centre_box()
    mask[:, :20] = True
    edit = noise(2, 40, 48, 3, seed=1)
    report = background_report(source, edit, mask)
    filled = [torch.where(mask[..., None], 0.0, video) for video in (source, edit)]
    assert report.psnr_zero_filled == pytest.approx(-10 * math.log10(float(((filled[0] - filled[1]) ** 2).mean())))
    assert report.psnr_zero_filled == pytest.approx(report.psnr - 10 * math.log10(report.background_share))


def test_what_happens_inside_the_mask_does_not_touch_the_background_measures():
    source, mask = noise(2, 40, 48, 3), centre_box()
    edit = (source + 0.05 * noise(2, 40, 48, 3, seed=1)).clamp(0, 1)
    wild = torch.where(mask[..., None], noise(2, 40, 48, 3, seed=2), edit)
    calm, other = background_report(source, edit, mask), background_report(source, wild, mask)
    assert (calm.psnr, calm.ssim) == (other.psnr, other.ssim)
    assert calm.change_inside != other.change_inside


def test_doing_nothing_has_no_change_inside_and_a_perfect_background():
    source, mask = noise(2, 40, 48, 3), centre_box()
    report = background_report(source, source.clone(), mask)
    assert report.psnr == math.inf
    assert report.ssim == pytest.approx(1.0)
    assert report.change_inside == 0
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["psnr"] == "inf"


def test_bytes_and_floats_measure_alike():
    source, edit = ((noise(2, 40, 48, 3, seed=s) * 255).round() for s in (0, 1))
    from_bytes = background_report(source.to(torch.uint8), edit.to(torch.uint8), centre_box())
    from_floats = background_report(source.double() / 255, edit.double() / 255, centre_box())
    assert from_bytes == pytest.approx(from_floats)


def test_frames_whose_mask_leaves_no_background_window_are_left_out():
    source, edit, mask = noise(2, 40, 48, 3), noise(2, 40, 48, 3, seed=1), centre_box()
    mask[1, ::8, ::8] = True
    one = background_report(source[:1], edit[:1], mask[:1])
    assert background_report(source, edit, mask).ssim == pytest.approx(one.ssim)
    assert math.isnan(background_report(source[1:], edit[1:], mask[1:]).ssim)
    assert background_report(source[1:], edit[1:], mask[1:]).to_dict()["ssim"] is None


def test_a_picture_smaller_than_the_window_has_no_ssim():
    mask = torch.zeros(1, 10, 30, dtype=torch.bool)
    mask[:, 0, 0] = True
    assert math.isnan(background_report(noise(1, 10, 30, 3), noise(1, 10, 30, 3), mask).ssim)


def test_similarity_agrees_with_its_definition_at_a_pixel():
    a, b = noise(15, 17, 3).double(), noise(15, 17, 3, seed=1).double()
    got = ssim_map(a, b)
    assert got.shape == (5, 7, 3)
    row, column = 3, 4
    x, y = (video[row : row + 11, column : column + 11, 2] for video in (a, b))
    weight = torch.tensor(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)],
        dtype=torch.float64,
    )
    weight /= weight.sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
    cov = (weight * (x - mx) * (y - my)).sum()
    want = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(got[row, column, 2]) == pytest.approx(float(want), abs=1e-12)


def test_the_reported_similarity_is_the_mean_over_windows_clear_of_the_mask():
    source, edit = noise(1, 40, 48, 3).double(), noise(1, 40, 48, 3, seed=1).double()
    mask = centre_box(1)
    full = ssim_map(source[0], edit[0])
    clear = [
        full[i, j] for i in range(30) for j in range(38) if not bool(mask[0, i : i + 11, j : j + 11].any())
    ]
    assert 0 < len(clear) < 30 * 38
    assert background_report(source, edit, mask).ssim == pytest.approx(float(torch.stack(clear).mean()), abs=1e-12)


@pytest.mark.parametrize(
    "source, edit, mask, message",
    [
        (noise(2, 40, 48), noise(2, 40, 48), centre_box(), r"source has shape \[2, 40, 48\]; wanted \[F, H, W, 3\]"),
        (noise(2, 40, 48, 3), noise(1, 40, 48, 3), centre_box(), r"edit has shape \[1, 40, 48, 3\]; wanted \[2, 40"),
        (noise(2, 40, 48, 3), noise(2, 40, 48, 3), centre_box(1), r"wanted torch.bool \[2, 40, 48\]"),
        (noise(2, 40, 48, 3), noise(2, 40, 48, 3), centre_box().float(), "wanted torch.bool"),
        (noise(2, 40, 48, 3), noise(2, 40, 48, 3), ~torch.zeros(2, 40, 48, dtype=torch.bool), "some on either side"),
        (noise(2, 40, 48, 3), noise(2, 40, 48, 3), torch.zeros(2, 40, 48, dtype=torch.bool), "marks 0 of 3840"),
    ],
)
def test_videos_and_masks_that_do_not_fit_are_refused(source, edit, mask, message):
    with pytest.raises(ValueError, match=message):
        background_report(source, edit, mask)


def test_a_map_of_a_picture_smaller_than_the_window_is_empty():
    assert ssim_map(noise(10, 30, 3), noise(10, 30, 3)).shape == (0, 20, 3)
