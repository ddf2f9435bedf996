"""Videos and masks from and to files: every frame exactly as it is, never resampled, never silently dropped."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import torch
from torch import Tensor

from kvlock.masks import binarize
from kvlock.pictures import IMAGE_SUFFIXES, read_picture

DEFAULT_FPS = 16.0  # of pictures, which name no rate: the rate Wan 2.1 was trained at
WRITABLE_SUFFIXES = (".mp4", ".mov", ".mkv")
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
LOCK_TINT = (0.10, 0.45, 0.95)
EDIT_TINT = (1.00, 0.35, 0.10)

_ACCURATE = "accurate_rnd+full_chroma_int"
_WITH_ALPHA = re.compile("yuva|gbrap|rgba|bgra|argb|abgr|ayuv|vuya|uyva|ya8|ya16|yaf|pal8")  # in pixel formats' names
_SIZE_CHECK = "kvlock_one_size"  # the name of a filter in ffmpeg's messages
_CRF = 10  # 0 is lossless, 18 is called visually lossless; 10 keeps the codec below the model's own error


class Video(NamedTuple):
    """A video in memory."""

    frames: Tensor  # uint8 [F, H, W, 3], RGB
    fps: float  # frames per second


def read_video(path: str | os.PathLike[str]) -> Video:
    """Read a video file, a folder of pictures in natural order (2 before 10), or one picture (F = 1).

    Pictures have no frame rate and get `DEFAULT_FPS`. A damaged video is refused rather than read in part. One that is
    transparent in parts is refused where its first frame has an alpha channel, and any with that of VP8 or VP9.

    Raises:
        ValueError: the path is missing, is no readable or no opaque video, a folder's pictures differ in size, or as
            `kvlock.pictures.read_picture`.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist; wanted a video, a picture or a folder of pictures")
    if has_rate(path):
        return _decode(path)
    return Video(_read_folder(path) if path.is_dir() else read_picture(path)[None], DEFAULT_FPS)


def has_rate(path: str | os.PathLike[str]) -> bool:
    """Whether what is read from there is a video file; a folder of pictures, or one, names no frame rate."""
    return not os.path.isdir(path) and Path(path).suffix.lower() not in IMAGE_SUFFIXES


def read_mask(path: str | os.PathLike[str], num_frames: int, height: int, width: int) -> Tensor:
    """Read a mask for a video of [num_frames, height, width]: bool [F, H, W], True (white, above one half) = edit.

    A single picture, or a folder that holds one, is used for every frame. Colours count by their luminance.

    Raises:
        ValueError: as `read_video`, or the mask has another size or length than the video.
    """
    frames, _ = read_video(path)
    found, wanted = tuple(frames.shape[1:3]), (height, width)
    if found != wanted:
        raise ValueError(
            f"mask {path} is {found[1]}x{found[0]} pixels (width x height); the video is {wanted[1]}x{wanted[0]}, "
            "and a mask is never resampled"
        )
    if len(frames) == 1 and not has_rate(path):
        frames = frames.expand(num_frames, -1, -1, -1)
    if len(frames) != num_frames:
        raise ValueError(f"mask {path} has {len(frames)} frames; the video has {num_frames}; wanted one for each")
    luminance = (frames.float() @ torch.tensor(LUMA)).round().to(torch.uint8)
    # A picture of black and almost black is a mask drawn with labels 0 and 1, which binarize would take for a mistake
    # of dtype: from a file it is simply below one half.
    return binarize(luminance.float() / 255)


def box_mask(box: str, num_frames: int, height: int, width: int) -> Tensor:
    """A still box as a mask: bool [F, H, W], True in columns x0..x1-1 and rows y0..y1-1.

    Args:
        box: "x0,y0,x1,y1" in pixels from the upper left corner; x1 and y1 lie just outside the box.

    Raises:
        ValueError: not four integers, an empty box, or one that leaves the picture.
    """
    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*){3}", box):
        raise ValueError(f"mask box {box!r} is not allowed; wanted x0,y0,x1,y1 in whole pixels")
    x0, y0, x1, y1 = (int(number) for number in box.split(","))
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"mask box {box!r} is empty; wanted x0 < x1 and y0 < y1")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise ValueError(f"mask box {box!r} leaves the picture; wanted 0,0 to {width},{height}")
    mask = torch.zeros(num_frames, height, width, dtype=torch.bool)
    mask[:, y0:y1, x0:x1] = True
    return mask


def write_video(path: str | os.PathLike[str], frames: Tensor, fps: float) -> None:
    """Write [F, H, W, 3] frames (uint8, or floating point in 0..1) as high-quality H.264.

    The file appears complete under its name or not at all. Frames keep their size: an odd width or height is written
    without chroma subsampling, which fewer players understand, instead of being padded.

    Raises:
        ValueError: the shape, the dtype, the rate or the ending is not one of those above, the folder does not exist,
            or the encoder refuses.
    """
    path = Path(path)
    check_writable(path)
    pictures = to_uint8(frames).cpu().contiguous()
    count, height, width, _ = pictures.shape
    if count == 0 or not 0 < fps < float("inf"):
        raise ValueError(f"cannot write {count} frames at {fps} per second; wanted at least 1 at a positive rate")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a folder")
    subsampled = height % 2 == 0 and width % 2 == 0
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:.6g}"]
    # Without the tag every player guesses the matrix from the picture's size.
    colour = ["-vf", f"scale=out_color_matrix=bt709:flags={_ACCURATE}", "-colorspace", "bt709"]
    colour += ["-color_primaries", "bt709", "-color_trc", "bt709"]
    codec = ["-c:v", "libx264", "-crf", str(_CRF), "-pix_fmt", "yuv420p" if subsampled else "yuv444p"]
    with tempfile.TemporaryDirectory(prefix=".kvlock-", dir=path.parent.absolute()) as folder:
        temporary = os.path.join(folder, f"video{path.suffix}")
        command = [*raw, "-i", "pipe:0", *colour, *codec, "-movflags", "+faststart", temporary]
        _run_ffmpeg(command, path, pictures.numpy().tobytes())
        os.replace(temporary, path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a name that `write_video` cannot write to.

    Raises:
        ValueError: another ending than `WRITABLE_SUFFIXES`, or a folder of that name exists.
    """
    if Path(path).suffix.lower() not in WRITABLE_SUFFIXES:
        raise ValueError(f"cannot write {path} as a video; wanted a name that ends in {', '.join(WRITABLE_SUFFIXES)}")
    if os.path.isdir(path):
        raise ValueError(f"cannot write {path} as a video: it is a folder")


def to_uint8(frames: Tensor) -> Tensor:
    """Frames [F, H, W, 3] as uint8; floating point in 0..1 is rounded to the nearest of 256 levels.

    Raises:
        ValueError: another shape or dtype, or values outside 0..1.
    """
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames have shape {list(frames.shape)}; wanted [F, H, W, 3]")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise ValueError(f"frames have dtype {frames.dtype}; wanted uint8 or floating point in 0..1")
    if frames.numel() and not bool(((frames >= 0) & (frames <= 1)).all()):
        raise ValueError(f"frames have values from {float(frames.min()):g} to {float(frames.max()):g}; wanted 0..1")
    return (frames.float() * 255).round().to(torch.uint8)


def overlay(
    frames: Tensor,  # uint8 [F, H, W, 3], or floating point in 0..1
    marked: Tensor,  # bool [F, H, W]
    *,
    tint: tuple[float, float, float] = LOCK_TINT,
    strength: float = 0.5,
) -> Tensor:  # uint8 [F, H, W, 3]
    """The frames with the marked pixels drawn towards a colour by `strength` (0 leaves them, 1 covers them).

    Raises:
        ValueError: the two shapes differ, or as `to_uint8`.
    """
    pictures = to_uint8(frames)
    if marked.shape != pictures.shape[:3]:
        raise ValueError(f"marked pixels have shape {list(marked.shape)}; wanted {list(pictures.shape[:3])}")
    colour = torch.tensor(tint, device=pictures.device) * 255
    tinted = torch.lerp(pictures.float(), colour.expand_as(pictures), strength).round().to(torch.uint8)
    return torch.where(marked.bool()[..., None], tinted, pictures)


def side_by_side(
    source: Tensor,  # [F, H, W, 3], uint8 or floating point in 0..1
    mask: Tensor,  # bool [F, H, W], True = edit
    edit: Tensor,  # [F, H, W, 3], uint8 or floating point in 0..1
    *,
    gap: int = 4,
) -> Tensor:  # uint8 [F, H, 3W + 2 gap, 3]
    """Source, source with the mask tinted, and edit, next to each other, with `gap` white columns between them.

    Raises:
        ValueError: the shapes differ, or as `to_uint8`.
    """
    left, right = to_uint8(source), to_uint8(edit).to(source.device)
    if left.shape != right.shape:
        raise ValueError(f"the edit has shape {list(right.shape)}; wanted {list(left.shape)} as the source")
    bar = left.new_full((left.shape[0], left.shape[1], gap, 3), 255)
    return torch.cat([left, bar, overlay(left, mask, tint=EDIT_TINT), bar, right], dim=2)


def _read_folder(folder: Path) -> Tensor:
    names = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not names:
        raise ValueError(f"folder {folder} holds no picture; wanted files that end in {', '.join(IMAGE_SUFFIXES)}")
    names.sort(key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)])
    pictures = [read_picture(path) for path in names]
    for path, picture in zip(names, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            found, wanted = ("x".join(str(side) for side in (p.shape[1], p.shape[0])) for p in (picture, pictures[0]))
            raise ValueError(f"{path} is {found} pixels; wanted {wanted}, the size of {names[0].name}")
    return torch.stack(pictures)


def _decode(path: Path) -> Video:
    name = os.path.abspath(path)  # ffmpeg takes what stands before a colon in "12:30.mp4" for a protocol
    width, height, fps, has_alpha = _stated(path, name)
    channels, form = (4, "rgba") if has_alpha else (3, "rgb24")
    strict = ["-xerror", "-err_detect", "explode", "-i", name]
    # Passthrough: by default frames of a variable-rate video are dropped or repeated to make the rate constant.
    raw = ["-fps_mode", "passthrough", "-sws_flags", _ACCURATE, "-f", "rawvideo", "-pix_fmt", form, "pipe:1"]
    # Frames of another size would be resampled to that of the first. The crop is made anew for each size: it takes the
    # whole of a frame that has the stated one, and more than there is, which is an error, of any other.
    whole = f"crop@{_SIZE_CHECK}=w='if(eq(iw,{width})*eq(ih,{height}),iw,2*iw)':h=ih:x=0:y=0:exact=1"
    try:
        decoded = _run_ffmpeg([*strict, "-vf", whole, *raw], path)
    except ValueError as error:
        if _SIZE_CHECK not in str(error):
            raise
        message = f"cannot read {path} as a video: not all its frames have its stated size {width}x{height}"
        raise ValueError(message) from error
    if not decoded or len(decoded) % (width * height * channels):
        raise ValueError(f"cannot read {path} as a video: it has no frames of its stated size {width}x{height}")
    frames = torch.frombuffer(bytearray(decoded), dtype=torch.uint8).reshape(-1, height, width, channels)
    if has_alpha and bool((frames[..., 3] < 255).any()):
        raise ValueError(f"{path} is transparent in parts; wanted an opaque video (a mask is white on black)")
    return Video(frames[..., :3].contiguous(), fps)


def _stated(path: Path, name: str) -> tuple[int, int, float, bool]:
    """Width, height, rate and whether there is an alpha channel, as ffmpeg's log of the first frame states them.

    Of several video streams it chooses what a player shows: the one that is marked as the default, a cover last.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-i", name, "-frames:v", "1"]
    done = subprocess.run([*command, "-f", "rawvideo", "pipe:1"], capture_output=True)
    log = done.stderr.decode(errors="replace")
    chosen = re.search(r"^ *Stream #0:(\d+) -> #0:0 ", log, re.M)
    size = chosen and re.search(r"^ *Stream #0:0.* Video: (.*) (\d+)x(\d+)[, ]", log[chosen.end() :], re.M)
    if not chosen or not size:
        raise ValueError(f"cannot read {path} as a video")
    if re.search(r"^ *alpha_mode *: 1$", log[chosen.end() :], re.M):  # VP8's and VP9's, which the decoders leave out
        raise ValueError(
            f"{path} has an alpha channel that is not read; wanted a video without, as -pix_fmt yuv420p makes it"
        )
    rate = re.search(rf"^ *Stream #0:{chosen[1]}\D.* ([\d.]+)(k?) fps", log[: chosen.start()], re.M)
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else DEFAULT_FPS
    return int(size[2]), int(size[3]), fps, bool(_WITH_ALPHA.search(size[1]))


def _run_ffmpeg(arguments: list[str], path: Path, data: bytes | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-loglevel", "error", *arguments]
    done = subprocess.run(command, capture_output=True, input=data or b"")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [_reason(done.returncode)]
        raise ValueError(f"ffmpeg cannot process {path}: {lines[0]}")
    return done.stdout


def _reason(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status == 256 - errno.ENOSPC:  # ffmpeg leaves with the negative error number
        return os.strerror(errno.ENOSPC)
    return f"exit status {status} without a message"
