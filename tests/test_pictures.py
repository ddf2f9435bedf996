"""Tests of reading still pictures: what cannot be read as it was stored is refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kvlock import video


def test_a_photograph_on_its_side_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=exif)
    assert video.read_video(tmp_path / "a.jpg").frames.shape == (1, 32, 16, 3)


def test_a_picture_of_sixteen_bits_is_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        video.read_video(tmp_path / "a.png")


def test_a_colour_picture_of_sixteen_bits_is_refused_too(tmp_path):
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(7)), b"IEND": b""}
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks.items():
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="more than 8 bits"):
        video.read_video(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_an_animated_picture_is_refused_rather_than_cut_to_its_first_frame(tmp_path, name):
    stills = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(3)]
    stills[0].save(tmp_path / name, save_all=True, append_images=stills[1:])
    with pytest.raises(ValueError, match=rf"{name} is an animation of 3 pictures; wanted one"):
        video.read_video(tmp_path / name)


def test_a_photograph_with_a_preview_inside_is_read(tmp_path):
    photograph = Image.new("RGB", (16, 8), "red")
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photograph.resize((8, 4))])
    assert video.read_video(tmp_path / "a.jpg").frames.shape == (1, 8, 16, 3)


def test_a_picture_that_is_transparent_in_parts_is_refused(tmp_path):
    shape = Image.new("RGBA", (8, 8), "white")
    shape.save(tmp_path / "a.png")
    assert video.read_mask(tmp_path / "a.png", 1, 8, 8).all()
    shape.putpixel((3, 3), (255, 255, 255, 0))
    shape.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is transparent in parts; wanted an opaque picture"):
        video.read_mask(tmp_path / "a.png", 1, 8, 8)
