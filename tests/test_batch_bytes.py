"""A source beside the edit leaves no keys and values behind: locking more layers keeps no more tensors alive."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch

from kvlock import KVLockConfig

LAYERS = 4


def living() -> int:
    """Bytes of the storages of all tensors there are."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage._cdata: storage.nbytes() for storage in storages if storage.device.type == "cpu"}.values())


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(layers=LAYERS)


@pytest.mark.parametrize("kernel", ["hooks", "fused", "backend"])
def test_more_locked_layers_keep_nothing_more_alive_between_layers(pipe, kernel):
    def most(layers: range) -> int:
        """Bytes after the last block, in an edit that locks these layers."""
        seen: list[int] = []
        config = KVLockConfig(kappa=1, window=2, fusion=0.5, layers=tuple(layers), source="batch")
        with pipe.transformer.blocks[-1].register_forward_hook(lambda *_: seen.append(living())):
            _, trace = tiny.locked_call(pipe, config, kernel=kernel, steps=1)
        assert trace[-1]["locked"] and trace[-1]["forwards"] == 4 and trace[-1]["source_bytes"] == 0
        return max(seen)

    few, all_ = most(range(1)), most(range(LAYERS))
    one = tiny.masks(pipe).background_rows * 2 * 12 * 4  # bytes of the K of a layer: two heads of 12 in fp32
    assert abs(all_ - few) < one
