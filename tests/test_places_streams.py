"""The order in which two streams of a GPU may run what places queue: nothing is read too early, or too late."""

from __future__ import annotations

import pytest
import torch
from simulated_gpu import GPU, LAYERS, SHAPE, put, served

from kvlock import KVLockConfig, Store
from kvlock.cost import ModelSizes, estimate
from kvlock.manifest import step_name
from kvlock.recorder import Recorder
from kvlock.step_file import Piece, StepFile
from kvlock.store import LAYERS_ON_DEVICE


@pytest.mark.parametrize("ahead", ["compute", "copies", "the host"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_rows_arrive_before_they_are_read_and_stay_until_they_were(monkeypatch, tmp_path, place, ahead):
    gpu = GPU(monkeypatch, ahead)
    shelf, pieces = served(place, tmp_path)
    read = []

    def check(memory: torch.Tensor, number: float) -> None:
        read.append(number)
        assert torch.equal(memory, torch.full(SHAPE, number)), f"found {memory.unique()}, wanted {number}"

    for step in range(3):
        number = {piece: 100.0 * step + 2 * piece.block + (piece.tensor == "v") for piece in pieces}
        shelf.turn_to(step)
        put(gpu, shelf, number)
        for _ in range(2):
            for piece in pieces:
                memory = shelf.get(piece).data.detach()
                gpu.compute.add(lambda memory=memory, wanted=number[piece]: check(memory, wanted))
    shelf.close()
    gpu.finish()
    assert len(read) == 3 * 2 * len(pieces)
    assert len(gpu.freed) == 3 * (len(pieces) + 2 * LAYERS_ON_DEVICE)  # what was put, and the room of each step
    assert all(memory.isnan().all() for memory in gpu.freed)
    _, tokens, values = SHAPE
    sizes = ModelSizes(layers=LAYERS, heads=1, head_dim=values, token_values=1)
    rows = {"tokens": tokens, "background_rows": tokens, "bytes_per_value": 4}
    assert gpu.most_pinned == estimate(sizes, KVLockConfig(), **rows, store=Store(place=place)).bytes_host


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_layer_computes_while_the_next_one_is_on_its_way(monkeypatch, tmp_path, place):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served(place, tmp_path)
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    shelf.get(pieces[0])  # sends the first two layers
    for piece in [*pieces[2:], *pieces]:
        sent = len(gpu.copies.queue)
        shelf.get(piece)
        if piece.tensor == "k":
            assert len(gpu.copies.queue) > sent  # the next layer's
        gpu.copies.advance(sent)
        gpu.compute.advance(force=False)
        assert gpu.compute.done == len(gpu.compute.queue), f"{piece} waits for the layer after it"
    shelf.close()


@pytest.mark.parametrize("ahead", ["compute", "copies", "the host"])
def test_what_is_recorded_is_what_was_put(monkeypatch, tmp_path, ahead):
    gpu, recorder = GPU(monkeypatch, ahead), Recorder(tmp_path / "source.kvlock")
    recorder.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    pieces = [Piece(0, "blocks", i, tensor) for i in range(LAYERS) for tensor in "kv"]
    for step in range(2):
        number = {piece: 100.0 * step + 2 * piece.block + (piece.tensor == "v") for piece in pieces}
        recorder.turn_to(step)
        put(gpu, recorder, number)
    gpu.finish()
    (folder,) = tmp_path.iterdir()
    for step in range(2):
        file = StepFile(folder / step_name(step))
        found = {piece: file.rows(piece).data.unique().tolist() for piece in file.pieces}
        assert found == {piece: [100.0 * step + 2 * piece.block + (piece.tensor == "v")] for piece in pieces}
