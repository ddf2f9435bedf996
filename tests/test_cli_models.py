"""Tests of model folders that do not fit together: each is refused in one line, before anything is denoised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvlock import mini

pytest_plugins = ["command_line"]

PARTS = {
    "transformer": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
}


@pytest.fixture
def copy(model, tmp_path):
    """The model's folder, to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def pickled(folder, part):
    """Replace a part's safetensors by a pickle of the same weights."""
    safe, unsafe = (folder / part / name for name in PARTS[part])
    torch.save(load_file(safe), unsafe)
    safe.unlink()


@pytest.mark.parametrize("part", PARTS)
def test_pickled_weights_are_refused_in_one_line(kvlock, here, copy, no_denoising, part):
    pickled(copy, part)
    code, out, err = kvlock("edit", "--example", "--model", copy)
    assert (code, out) == (2, []) and not no_denoising
    assert err[-1].startswith(f"kvlock: error: cannot load model {copy}: ")
    assert "safetensors" in err[-1] and part in err[-1]


@pytest.mark.parametrize("part", PARTS)
def test_the_miniature_is_never_unpickled(copy, part):
    pickled(copy, part)
    with pytest.raises(ValueError, match=f"{part}.*safetensors|safetensors.*{part}"):
        mini.load(copy)


@pytest.mark.parametrize(
    "pipeline, transformer, wanted",
    [
        ("WanPipeline", "WanVACETransformer3DModel", "WanTransformer3DModel"),
        ("WanVideoToVideoPipeline", "WanVACETransformer3DModel", "WanTransformer3DModel"),
        ("WanVACEPipeline", "WanTransformer3DModel", "WanVACETransformer3DModel"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "estimate"])
def test_a_pipeline_with_the_transformer_of_another_is_refused(
    kvlock, here, copy, no_denoising, command, pipeline, transformer, wanted
):
    change(copy / "model_index.json", _class_name=pipeline)
    change(copy / "transformer/config.json", _class_name=transformer)
    code, out, err = kvlock(command, "--example", "--model", copy)
    assert (code, out) == (2, []) and not no_denoising
    assert err[-1] == f"kvlock: error: {pipeline} runs a {wanted}; found a {transformer}"


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_a_transformer_with_fewer_weights_than_layers_is_refused(kvlock, here, copy, no_denoising, offload):
    change(copy / "transformer/config.json", num_layers=5)
    code, out, err = kvlock("edit", "--example", "--model", copy, "--offload", offload, "--device", "cpu")
    assert (code, out) == (2, []) and not no_denoising
    assert err[-1].startswith(f"kvlock: error: cannot load model {copy}: its transformer has no weights for blocks.3.")


def test_a_model_that_cannot_be_placed_is_refused(kvlock, here, model, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr("diffusers.DiffusionPipeline.to", fail)
    code, _, err = kvlock("edit", "--example", "--model", model)
    assert code == 2
    assert err[-1] == f"kvlock: error: cannot load model {model}: Cannot copy out of meta tensor; no data!"


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("values", [None, [1.0] * 15, [1.0] * 15 + [None], [1.0] * 15 + [float("inf")], 1.0])
def test_a_vae_without_one_number_a_channel_is_refused_before_denoising(kvlock, here, copy, name, values):
    change(copy / "vae/config.json", **{name: values})
    code, out, err = kvlock("edit", "--example", "--model", copy, "--steps", 2)
    assert (code, out) == (2, [])
    assert f"the VAE has {name}=" in err[-1] and "wanted 16 finite numbers" in err[-1]
    assert not any("1/2" in line for line in err)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-60])
def test_a_vae_whose_latents_have_no_spread_is_refused(kvlock, here, copy, value):
    change(copy / "vae/config.json", latents_std=[1.0] * 15 + [value])
    code, _, err = kvlock("edit", "--example", "--model", copy, "--steps", 2)
    assert code == 2 and "the VAE has latents_std=" in err[-1] and "finite numbers > 0" in err[-1]
