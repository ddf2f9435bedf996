"""Tests of reading and writing videos and masks: nothing is resampled, dropped or left half-written."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from kvlock import video


def smooth(num_frames=6, height=32, width=48):
    """Frames that differ from each other and survive a lossy codec."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij")
    return torch.stack([x, y, t], dim=-1)


def save(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *arguments], check=True)


@pytest.mark.parametrize("height, width", [(32, 48), (31, 48), (32, 47), (18, 94)])
@pytest.mark.parametrize("num_frames", [1, 6])
def test_a_written_video_has_the_same_frames_height_and_width(tmp_path, num_frames, height, width):
    frames = smooth(num_frames, height, width)
    video.write_video(tmp_path / "a.mp4", frames, 12.5)
    read, fps = video.read_video(tmp_path / "a.mp4")
    assert read.dtype == torch.uint8
    assert read.shape == frames.shape
    assert fps == 12.5
    assert (read.float() / 255 - frames).abs().mean() < 0.01


@pytest.mark.parametrize("rate", [0.5, 29.97, 999, 1000, 1500, 100_000])
def test_the_rate_comes_back(tmp_path, rate):  # ffmpeg writes 1000 as 1k
    video.write_video(tmp_path / "a.mp4", smooth(), rate)
    assert video.read_video(tmp_path / "a.mp4").fps == rate


def test_a_video_without_a_rate_has_that_of_pictures(tmp_path):
    save(tmp_path / "a.png", np.zeros((4, 6, 3)))
    ffmpeg("-i", tmp_path / "a.png", "-c", "copy", "-disposition:v:0", "attached_pic", tmp_path / "a.m4v")
    frames, fps = video.read_video(tmp_path / "a.m4v")
    assert frames.shape == (1, 4, 6, 3) and fps == video.DEFAULT_FPS


def test_of_several_streams_the_one_that_players_show_is_read(tmp_path):
    video.write_video(tmp_path / "a.mp4", smooth(6, 32, 48), 12)
    save(tmp_path / "cover.png", np.zeros((64, 96, 3)))
    inputs = ["-i", tmp_path / "cover.png", "-i", tmp_path / "a.mp4", "-f", "lavfi", "-t", "1", "-i", "sine"]
    options = ["-map", "0", "-map", "1", "-map", "2", "-c:v", "copy", "-disposition:v:1", "default"]
    ffmpeg(*inputs, *options, tmp_path / "both.mkv")
    frames, fps = video.read_video(tmp_path / "both.mkv")
    assert torch.equal(frames, video.read_video(tmp_path / "a.mp4").frames) and fps == 12


def test_colours_survive_within_two_levels(tmp_path):
    colours = torch.tensor([[0.86, 0.10, 0.12], [0.12, 0.25, 0.88], [0.10, 0.62, 0.18], [0.5, 0.5, 0.5]])
    frames = colours[:, None, None].expand(4, 64, 64, 3)
    video.write_video(tmp_path / "a.mp4", frames, 8)
    error = video.read_video(tmp_path / "a.mp4").frames.float() / 255 - frames
    assert error.mean(dim=(1, 2)).abs().max() < 2.5 / 255


def test_frames_of_a_variable_rate_video_are_neither_dropped_nor_repeated(tmp_path):
    stills = [Image.new("RGB", (32, 32), (40 * n, 0, 0)) for n in range(6)]
    durations = [40, 400, 40, 40, 800, 40]
    stills[0].save(tmp_path / "a.gif", save_all=True, append_images=stills[1:], duration=durations)
    frames, _ = video.read_video(tmp_path / "a.gif")
    assert len(frames) == 6
    assert frames[:, 16, 16, 0].tolist() == pytest.approx([40 * n for n in range(6)], abs=4)


@pytest.mark.parametrize("codec, form", [("qtrle", "argb"), ("ffv1", "yuva444p"), ("prores_ks", "yuva444p10le")])
def test_a_video_that_is_transparent_in_parts_is_refused_as_a_picture_is(tmp_path, codec, form):
    picture = torch.cat([smooth(1)[0], torch.ones(32, 48, 1)], dim=2).mul(255).byte()
    for name in ("opaque", "cut-out"):
        save(tmp_path / f"{name}.png", picture)
        ffmpeg("-i", tmp_path / f"{name}.png", "-c:v", codec, "-pix_fmt", form, tmp_path / f"{name}.mov")
        picture[8:16, 8:16, 3] = 0
    read = video.read_video(tmp_path / "opaque.mov").frames.float()
    assert (read - picture[..., :3]).abs().mean() < 2
    with pytest.raises(ValueError, match=r"cut-out\.mov is transparent in parts; wanted an opaque video"):
        video.read_mask(tmp_path / "cut-out.mov", 1, 32, 48)


def test_a_video_whose_transparency_is_in_a_stream_of_its_own_is_refused(tmp_path):
    source = "testsrc=size=48x32:rate=8:duration=0.5,format=rgba,colorchannelmixer=aa=0.5"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", tmp_path / "a.webm")
    with pytest.raises(ValueError, match=r"a\.webm has an alpha channel that is not read; wanted a video without"):
        video.read_video(tmp_path / "a.webm")


def test_a_folder_is_read_in_natural_order(tmp_path):
    for n in (10, 2, 1):
        save(tmp_path / f"frame{n}.png", np.full((4, 6, 3), n))
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "._frame1.png").write_text("left behind by a file browser")
    frames, fps = video.read_video(tmp_path)
    assert frames.shape == (3, 4, 6, 3)
    assert frames[:, 0, 0, 0].tolist() == [1, 2, 10]
    assert fps == video.DEFAULT_FPS


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    save(tmp_path / "a.png", np.full((4, 6), 7))
    assert video.read_video(tmp_path / "a.png").frames.tolist() == torch.full((1, 4, 6, 3), 7).tolist()


def test_pictures_of_different_sizes_are_refused_by_name(tmp_path):
    save(tmp_path / "a.png", np.zeros((4, 6, 3)))
    save(tmp_path / "b.png", np.zeros((4, 8, 3)))
    with pytest.raises(ValueError, match=r"b\.png is 8x4 pixels; wanted 6x4"):
        video.read_video(tmp_path)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing.mp4": "does not exist",
        "text.mp4": r"cannot read .* as a video",
        "text.png": r"cannot read .* as a picture",
        "empty": "holds no picture",
    }.items():
        with pytest.raises(ValueError, match=message):
            video.read_video(tmp_path / name)


def test_a_superscript_in_the_name_of_a_picture_is_no_number(tmp_path):
    save(tmp_path / "²1.png", np.zeros((4, 6, 3)))
    assert len(video.read_video(tmp_path).frames) == 1


def test_a_relative_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write_video("12:30.mp4", smooth(), 8)
    assert len(video.read_video("12:30.mp4").frames) == 6


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    video.write_video(tmp_path / f"{'x' * 251}.mp4", smooth(), 8)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "status, reason",
    [(-9, "ended by SIGKILL"), (228, "No space left on device"), (3, "exit status 3 without a message")],
)
def test_an_encoder_that_fails_in_silence_is_still_explained(tmp_path, monkeypatch, status, reason):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, b"", b""))
    with pytest.raises(ValueError, match=rf"a\.mp4: {reason}"):
        video.write_video(tmp_path / "a.mp4", smooth(), 8)


def test_a_damaged_video_is_refused_rather_than_read_in_part(tmp_path):
    noise = torch.rand(8, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    video.write_video(tmp_path / "a.mp4", noise, 8)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut\.mp4"):
        video.read_video(tmp_path / "cut.mp4")


def stream(tmp_path, height, width):
    """The bytes of a raw H.264 stream, which can be put after one another."""
    video.write_video(tmp_path / "part.mp4", smooth(6, height, width), 8)
    ffmpeg("-i", tmp_path / "part.mp4", "-c", "copy", tmp_path / "part.h264")
    return (tmp_path / "part.h264").read_bytes()


@pytest.mark.parametrize("height, width", [(16, 48), (48, 32), (64, 96), (32, 64)])
def test_frames_that_change_their_size_are_refused_rather_than_resampled(tmp_path, height, width):
    first = stream(tmp_path, 32, 48)
    path = tmp_path / "crop.h264"
    path.write_bytes(first + first)
    assert video.read_video(path).frames.shape == (12, 32, 48, 3)
    path.write_bytes(first + stream(tmp_path, height, width))
    with pytest.raises(ValueError, match=r"crop\.h264 as a video: not all its frames have its stated size 48x32$"):
        video.read_video(path)


def test_a_mask_video_comes_back_as_it_was_written(tmp_path):
    mask = torch.zeros(5, 32, 48, dtype=torch.bool)
    for n in range(5):
        mask[n, 8:24, 8 + 4 * n : 20 + 4 * n] = True
    video.write_video(tmp_path / "mask.mp4", mask[..., None].expand(-1, -1, -1, 3).float(), 8)
    assert torch.equal(video.read_mask(tmp_path / "mask.mp4", 5, 32, 48), mask)


def test_one_mask_picture_serves_every_frame(tmp_path):
    pixels = np.zeros((4, 6, 3))
    pixels[1:3, 2:4] = 255
    save(tmp_path / "mask.png", pixels)
    mask = video.read_mask(tmp_path / "mask.png", 5, 4, 6)
    assert mask.dtype == torch.bool and mask.shape == (5, 4, 6)
    assert torch.equal(mask, torch.tensor(pixels[..., 0] > 0).expand(5, 4, 6))


def test_a_mask_is_cut_at_one_half_of_its_luminance(tmp_path):
    save(tmp_path / "mask.png", [[[127] * 3, [128] * 3, [255, 0, 0], [0, 255, 0]]])
    assert video.read_mask(tmp_path / "mask.png", 1, 1, 4).tolist() == [[[False, True, False, True]]]


def test_a_mask_of_labels_zero_and_one_is_black(tmp_path):
    save(tmp_path / "mask.png", [[0, 1]])
    assert not video.read_mask(tmp_path / "mask.png", 1, 1, 2).any()


def test_a_mask_of_another_size_or_length_is_refused_naming_both(tmp_path):
    video.write_video(tmp_path / "mask.mp4", smooth(5, 32, 48), 8)
    with pytest.raises(ValueError, match=r"is 48x32 pixels .* the video is 96x32"):
        video.read_mask(tmp_path / "mask.mp4", 5, 32, 96)
    with pytest.raises(ValueError, match=r"has 5 frames; the video has 9"):
        video.read_mask(tmp_path / "mask.mp4", 9, 32, 48)


def test_a_mask_video_of_one_frame_does_not_stand_for_more(tmp_path):
    video.write_video(tmp_path / "mask.mp4", smooth(1), 8)
    with pytest.raises(ValueError, match="has 1 frames; the video has 5"):
        video.read_mask(tmp_path / "mask.mp4", 5, 32, 48)


def test_a_box_is_half_open():
    mask = video.box_mask("1, 0, 3, 2", 2, 3, 4)
    assert mask.int().tolist() == [[[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]] * 2


@pytest.mark.parametrize(
    "box, message",
    [
        ("1,2,3", "wanted x0,y0,x1,y1"),
        ("1,2,3,4.5", "wanted x0,y0,x1,y1"),
        ("2,0,2,2", "is empty"),
        ("0,2,3,1", "is empty"),
        ("0,0,5,2", "leaves the picture; wanted 0,0 to 4,3"),
        ("0,0,4,4", "leaves the picture"),
        ("-1,0,2,2", "leaves the picture"),
        ("0,-1,2,2", "leaves the picture"),
    ],
)
def test_a_box_that_is_none_is_refused(box, message):
    with pytest.raises(ValueError, match=message):
        video.box_mask(box, 2, 3, 4)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"old")

    def fail(command, **_):
        Path(command[-1]).write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, b"", b"disk full\nmore")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match=r"a\.mp4: disk full$"):
        video.write_video(tmp_path / "a.mp4", smooth(), 8)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.mp4", b"old")]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(command, **_):
        Path(command[-1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(tmp_path / "a.mp4", smooth(), 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, frames, fps, message",
    [
        ("a.png", smooth(), 8, r"ends in \.mp4"),
        ("a", smooth(), 8, r"ends in \.mp4"),
        ("gone/a.mp4", smooth(), 8, "is not a folder"),
        ("a.mp4", smooth()[:0], 8, "at least 1"),
        ("a.mp4", smooth(), 0, "positive rate"),
        ("a.mp4", smooth() + 1, 8, r"values from 1 to 2; wanted 0\.\.1"),
        ("a.mp4", smooth() * float("nan"), 8, r"wanted 0\.\.1"),
        ("a.mp4", smooth()[..., :2], 8, r"wanted \[F, H, W, 3\]"),
        ("a.mp4", smooth().int(), 8, "wanted uint8 or floating point"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, name, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        video.write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_an_even_video_is_written_in_the_format_every_player_knows(tmp_path):
    video.write_video(tmp_path / "a.mp4", smooth(), 8)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")


def test_floating_point_is_rounded_to_the_nearest_level():
    levels = torch.tensor([0.0, 0.49, 0.51, 254.4, 254.6, 255.0]).reshape(1, 1, 2, 3) / 255
    assert video.to_uint8(levels).flatten().tolist() == [0, 0, 1, 254, 255, 255]


def test_an_overlay_changes_the_marked_pixels_only():
    frames = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    marked = torch.tensor([[[True, False], [False, False]]])
    drawn = video.overlay(frames, marked, tint=(1.0, 0.0, 0.5), strength=0.5)
    assert drawn[0, 0, 0].tolist() == [128, 0, 64]
    assert not drawn[~marked].any()
    with pytest.raises(ValueError, match=r"shape \[2, 2\]; wanted \[1, 2, 2\]"):
        video.overlay(frames, marked[0], tint=(1.0, 0.0, 0.5))


def test_side_by_side_shows_source_mask_and_edit_in_this_order():
    source = torch.full((2, 4, 6, 3), 0.2)
    edit = torch.full((2, 4, 6, 3), 0.6)
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[:, 1, 1] = True
    row = video.side_by_side(source, mask, edit, gap=2)
    assert row.shape == (2, 4, 22, 3)
    assert (row[:, :, :6] == 51).all()
    assert (row[:, :, 6:8] == 255).all() and (row[:, :, 14:16] == 255).all()
    assert torch.equal((row[:, :, 8:14] != 51).any(-1), mask)
    assert (row[:, :, 16:] == 153).all()
    with pytest.raises(ValueError, match=r"wanted .* as the source"):
        video.side_by_side(source, mask, edit[:1])
