"""The file of one step: what is written is what is read, and other files hold no rows."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvlock.step_file import HEADER_BYTES, Piece, StepFile, StepWriter
from kvlock.store import Rows
from kvlock_kernels import reference


def test_a_code_that_is_no_number_decodes_to_what_the_reference_says(tmp_path):
    data = torch.tensor([0x7F, 0xFF, 0x38, 0x00], dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 1, 4)
    rows, piece = Rows(data, torch.full((1, 1, 1), 2.0)), Piece(0, "blocks", 0, "k")
    writer = StepWriter(tmp_path / "step")
    for tensor in "kv":
        writer.add(piece._replace(tensor=tensor), rows)
    writer.close()
    found = StepFile(tmp_path / "step").rows(piece)
    decoded = found.unpacked(torch.float32)
    expected = reference.unpack_kv(data, rows.scale, dtype=torch.float32)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert decoded.isnan().flatten().tolist() == [True, True, False, False]
    assert decoded.flatten().tolist()[2:] == [2.0, 0.0]


def test_a_step_file_is_a_file_of_safetensors(tmp_path):
    piece = Piece(1, "vace_blocks", 12, "v")
    rows = Rows(torch.arange(15, dtype=torch.int8).view(1, 5, 3, 1), torch.rand(1, 5, 3), torch.rand(1, 3, 1))
    writer = StepWriter(tmp_path / "step")
    writer.add(piece, rows)
    writer.add(piece._replace(tensor="k"), Rows(torch.empty(1, 0, 6, dtype=torch.bfloat16)))
    writer.close()
    tensors = load_file(tmp_path / "step")
    assert torch.equal(tensors["1.vace_blocks.12.v.data"], rows.data)
    assert torch.equal(tensors["1.vace_blocks.12.v.mean"], rows.mean)
    assert StepFile(tmp_path / "step").pieces == [piece, piece._replace(tensor="k")]
    assert Piece.parse(str(piece)) == piece
    for part in StepFile(tmp_path / "step").rows(piece):
        assert part.data_ptr() % 64 == 0


@pytest.mark.parametrize("before", [0, 3, 9], ids=["none", "shorter", "longer"])
def test_what_is_written_over_a_file_is_all_that_it_holds(tmp_path, before):
    path, piece = tmp_path / "step", Piece(0, "blocks", 0, "k")

    def write(rows: int, *, value: float) -> None:
        writer = StepWriter(path, over=True)
        for tensor in "kv":
            writer.add(piece._replace(tensor=tensor), Rows(torch.full((1, rows, 2, 8), value)))
        writer.close()

    if before:
        write(before, value=1.0)
        (tmp_path / "same").hardlink_to(path)
    write(5, value=2.0)
    assert torch.equal(StepFile(path).rows(piece).data, torch.full((1, 5, 2, 8), 2.0))
    assert not before or path.samefile(tmp_path / "same")
    with pytest.raises(ValueError, match=r"cannot write .*step: File exists"):
        StepWriter(path)


@pytest.mark.parametrize(("before", "cuts"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_only_a_file_that_was_longer_is_cut_since_a_cut_waits_for_the_disk(tmp_path, before, cuts):
    path, rows = tmp_path / "step", Rows(torch.zeros(1, 5, 2, 8))
    for blocks in (before, 2):
        writer = StepWriter(path, over=True)
        writer._file = mock.Mock(wraps=writer._file)
        for block in range(blocks):
            for tensor in "kv":
                writer.add(Piece(0, "blocks", block, tensor), rows)
        writer.close()
        assert writer._file.close.called
    assert writer._file.truncate.call_count == cuts
    assert path.stat().st_size == HEADER_BYTES + 4 * rows.bytes_kept
    assert len(StepFile(path).pieces) == 4


def test_rows_of_a_dtype_that_the_format_lacks_are_refused_by_name(tmp_path):
    writer, rows = StepWriter(tmp_path / "step"), Rows(torch.zeros(1, 1, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"step cannot hold 0.blocks.0.k.data of torch.complex64; wanted one of F64"):
        writer.add(Piece(0, "blocks", 0, "k"), rows)
    assert list(tmp_path.iterdir()) == []


def test_the_header_has_room_for_the_largest_models(tmp_path):
    writer = StepWriter(tmp_path / "step")
    rows = Rows(torch.zeros(1, 3, 40, 1, dtype=torch.int8), torch.zeros(1, 3, 40), torch.zeros(1, 40, 1))
    pieces = [Piece(1, "vace_blocks", block, tensor) for block in range(10, 90) for tensor in "vk"]
    for piece in pieces:
        writer.add(piece, rows)
    writer.close()
    assert StepFile(tmp_path / "step").pieces == pieces


def test_a_file_of_something_else_holds_no_rows(tmp_path):
    (tmp_path / "step").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"step holds no source rows"):
        StepFile(tmp_path / "step")
    with pytest.raises(ValueError, match=r"none holds no source rows"):
        StepFile(tmp_path / "none")
    save_file({"0.blocks.0.k.data": torch.zeros(1)}, tmp_path / "half")
    with pytest.raises(ValueError, match=r"half holds no source rows: 0.blocks.0.k is not whole"):
        StepFile(tmp_path / "half")
    save_file({"0.blocks.0.v.data": torch.zeros(1)}, tmp_path / "other half")
    assert len(StepFile(tmp_path / "half", tmp_path / "other half").pieces) == 2
    with pytest.raises(ValueError, match=r"half and .*half holds no source rows: 0.blocks.0.k is not whole"):
        StepFile(tmp_path / "half", tmp_path / "half")
    save_file({"x.data": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"foreign holds no source rows"):
        StepFile(tmp_path / "foreign")
