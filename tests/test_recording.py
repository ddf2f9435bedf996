"""A recording of the source: the same edit without a source pass."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from PIL import Image
from recordings import CONFIG, STEPS, edit, make

import kvlock
from kvlock import KVLockConfig, Recording, Store, checksums, step_file
from kvlock.adapters.kernels import KERNELS
from kvlock.cost import ModelSizes, estimate
from kvlock.manifest import hash_of
from kvlock.step_file import HEADER_BYTES


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(WanVACEPipeline)


@pytest.fixture(scope="module")
def recording(pipe, tmp_path_factory):
    return make(pipe, tmp_path_factory.mktemp("recording") / "source.kvlock")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("kind", "dtype"), [(WanPipeline, torch.bfloat16), (WanVACEPipeline, torch.float32)])
def test_an_edit_from_a_recording_is_the_one_shot_edit_bit_for_bit(tmp_path, kind, dtype, kernel):
    pipe = tiny.pipeline(kind, "unipc")
    pipe.transformer.to(dtype)
    expected, trace = edit(pipe, kernel=kernel)
    found = make(pipe, tmp_path / "source.kvlock", kernel=kernel)
    latents, replayed = edit(pipe, kernel=kernel, recording=found)
    assert torch.equal(latents, expected)
    tiny.assert_locked(replayed, CONFIG)
    assert [row["source_bytes"] for row in replayed] == [row["source_bytes"] for row in trace]
    assert tiny.leftovers(pipe) == []
    plain = tiny.call(pipe, steps=STEPS)
    assert not torch.equal(plain, expected)


def test_a_video_to_video_edit_from_a_recording_is_the_one_shot_edit(tmp_path):
    pipe = tiny.pipeline(WanVideoToVideoPipeline, "unipc")
    expected, _ = edit(pipe)
    found = make(pipe, tmp_path / "source.kvlock")
    latents, trace = edit(pipe, recording=found)
    assert torch.equal(latents, expected) and {row["forwards"] for row in trace} == {2}


def test_twenty_locked_steps_of_fifty_cost_a_hundred_forwards_instead_of_a_hundred_and_twenty(tmp_path):
    pipe, config = tiny.pipeline(WanPipeline), KVLockConfig(kappa=20)
    one_shot, trace = edit(pipe, config, steps=50)
    found = make(pipe, tmp_path / "source.kvlock", config, steps=50)
    again, replayed = edit(pipe, config, steps=50, recording=found)
    assert [sum(row["forwards"] for row in rows) for rows in (trace, replayed)] == [120, 100]
    assert torch.equal(again, one_shot)


@pytest.mark.parametrize("store", [Store("int8", k_mean=True), Store("fp8")], ids=str)
def test_packed_rows_are_recorded_as_a_packed_store_keeps_them(tmp_path, store):
    pipe = tiny.pipeline(WanPipeline)
    expected, _ = edit(pipe, store=store)
    found = make(pipe, tmp_path / "source.kvlock", store=store)
    assert torch.equal(edit(pipe, recording=found)[0], expected)
    assert found.fields["rows"] == {"dtype": store.dtype, "k_mean": True}


def test_an_edit_may_lock_fewer_steps_and_layers_than_were_recorded(pipe, recording):
    fewer = KVLockConfig(kappa=2, window=3, tau=0.6, layers=(1,))
    (latents, replayed), (expected, trace) = edit(pipe, fewer, recording=recording), edit(pipe, fewer)
    assert torch.equal(latents, expected)
    assert [row["source_bytes"] for row in replayed] == [row["source_bytes"] for row in trace]


def test_another_seed_keeps_the_noise_of_the_source_and_says_so(pipe, recording):
    with pytest.warns(UserWarning, match=r"source.kvlock was noised with another seed: it keeps that noise"):
        latents, _ = edit(pipe, recording=recording, seed=1)
    assert not torch.equal(latents, edit(pipe, seed=1)[0])  # its source has the noise of the edit
    assert not torch.equal(latents, edit(pipe)[0])


def test_an_edit_without_a_lock_has_no_use_for_a_recording(pipe, recording):
    latents, trace = edit(pipe, kvlock.preset("plain"), recording=recording, steps=4, seed=3)
    assert torch.equal(latents, tiny.call(pipe, steps=4, seed=3)) and {row["forwards"] for row in trace} == {2}


def test_two_openings_of_a_recording_read_the_same_rows(recording):
    first, second = recording.step(4), Recording(recording.path).step(4)
    assert first.pieces == second.pieces
    for piece in first.pieces:
        assert torch.equal(first.rows(piece).data, second.rows(piece).data)


def test_a_batch_is_recorded_for_a_batch(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    options = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, tmp_path / "two", tiny.source_latents(), tiny.masks(pipe), **options):
        tiny.call(pipe, steps=STEPS, num_videos_per_prompt=2)
    found = {"config": CONFIG, "recording": Recording(tmp_path / "two")}
    latents = []
    for given in (options, found):
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **given):
            latents.append(tiny.call(pipe, steps=STEPS, num_videos_per_prompt=2))
    assert torch.equal(*latents)
    with pytest.raises(ValueError, match=r"two was recorded with batch 2, this edit has 1; wanted them alike"):
        edit(pipe, recording=found["recording"])


def test_a_prompt_padded_to_another_length_is_refused(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    found, padded = make(pipe, tmp_path / "source.kvlock"), torch.zeros(1, 2, 32)
    longer = {name: torch.cat([value, padded], dim=1) for name, value in tiny.PROMPT.items()}
    options: dict[str, Any] = {"config": CONFIG, "recording": found}
    with pytest.raises(ValueError, match=r"recorded with prompt_tokens 8, this edit has 10"):
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
            tiny.call(pipe, steps=STEPS, **longer)


def test_checksums_are_compared_ahead_and_again_where_a_file_has_changed(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    found = make(pipe, tmp_path / "source.kvlock")
    options: dict[str, Any] = {"config": CONFIG, "recording": found}
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
        tiny.call(pipe, steps=STEPS)
    assert len(found._verified) == len(found.steps) == 3
    file = found.path / "step-0004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"step-0004.safetensors has checksum [0-9a-f]{12}; wanted [0-9a-f]{12}, as"):
        edit(pipe, recording=found)


def slow_digest(monkeypatch, seconds: float) -> None:
    """Step files take this long to be read."""

    def digest(path, stopped=None):
        if stopped is not None and stopped.wait(seconds):
            return "of its beginning"
        return step_file.digest(path)

    monkeypatch.setattr(checksums, "digest", digest)


def test_verifying_stops_with_the_session_and_begins_again_with_the_next(tmp_path, monkeypatch):
    pipe = tiny.pipeline(WanPipeline)
    found = make(pipe, tmp_path / "source.kvlock")
    before = threading.active_count()
    slow_digest(monkeypatch, 60)
    options: dict[str, Any] = {"config": CONFIG, "recording": found}
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
        pass
    assert found._verified == {} and threading.active_count() == before
    monkeypatch.undo()
    edit(pipe, recording=found)


def test_the_end_of_one_session_stops_no_other_s_checks(tmp_path, monkeypatch):
    one, other = tiny.pipeline(WanPipeline), tiny.pipeline(WanPipeline)
    found = make(one, tmp_path / "source.kvlock")
    expected, _ = edit(one, recording=Recording(found.path))
    slow_digest(monkeypatch, 0.5)
    options: dict[str, Any] = {"config": CONFIG, "recording": found}
    with kvlock.attach(one, tiny.source_latents(), tiny.masks(one), **options):
        with kvlock.attach(other, tiny.source_latents(), tiny.masks(other), **options):
            pass
        assert torch.equal(tiny.call(one, steps=STEPS), expected)


def test_a_path_is_where_it_was_when_the_folder_changes(tmp_path, monkeypatch):
    pipe = tiny.pipeline(WanPipeline)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, "source", tiny.source_latents(), tiny.masks(pipe), **options):
        monkeypatch.chdir(tmp_path / "elsewhere")
        tiny.call(pipe, steps=STEPS)
    monkeypatch.chdir(tmp_path)
    found = Recording("source")
    monkeypatch.chdir(tmp_path / "elsewhere")
    edit(pipe, recording=found)
    monkeypatch.chdir(tmp_path)
    edit(pipe, store=Store(place="disk", folder="elsewhere"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_estimate_foretells_the_size_of_a_recording(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    found, masks = make(pipe, tmp_path / "source.kvlock", store=Store("int8", k_mean=True)), tiny.masks(pipe)
    rows = {"tokens": masks.num_tokens, "background_rows": masks.background_rows}
    sizes, store = ModelSizes.of(pipe.transformer.config), Store("int8", k_mean=True)
    foretold = estimate(sizes, CONFIG, **rows, num_steps=STEPS, bytes_per_value=4, store=store).bytes_recording
    files = [path.stat().st_size - HEADER_BYTES for path in found.path.glob("step-*")]
    assert len(files) == 3 and foretold <= sum(files) <= 1.1 * foretold
    assert found.bytes_on_disk == sum(path.stat().st_size for path in found.path.glob("*.safetensors"))


def test_an_edit_from_a_recording_that_runs_out_of_memory_has_no_other_place_to_go(pipe, recording):
    options: dict[str, Any] = {"config": CONFIG, "recording": recording}
    with pytest.raises(RuntimeError) as error:
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
            raise torch.OutOfMemoryError("CUDA out of memory")
    assert not hasattr(error.value, "__notes__")


def test_an_edit_has_the_recorded_mask_and_references_to_the_pixel(tmp_path):
    edits = kvlock.KVLockPipeline(tiny.miniature(), CONFIG)
    video = torch.rand(tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1)).movedim(1, -1)
    mask, red, other = tiny.pixel_mask(), Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), (254, 0, 0))
    mask = mask.movedim(0, -1).contiguous().movedim(-1, 0)  # neither the video nor the mask is contiguous
    call: dict[str, Any] = {"num_inference_steps": 4, "source_prompt": "a star"}
    seed = torch.Generator().manual_seed(11)
    found = edits.record(tmp_path / "source", video, mask, reference_images=red, generator=seed, **call)
    assert torch.equal(found.inputs["frames"], video) and torch.equal(found.inputs["mask"], mask)
    about = json.loads((found.path / "manifest.json").read_text())["about"]
    pixels = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(8, 8, 3)
    assert (about["video"], about["mask"]) == (hash_of(video), hash_of(mask)) and about["seed"] == 11
    assert about["references"] == [hash_of(pixels)] and about["source_prompt"] == "a star"
    call |= {"recording": found}
    with pytest.raises(ValueError, match=r"was recorded with references \['[0-9a-f]{12}'\], this edit has \['"):
        edits(video, mask, "a circle", reference_images=other, **call)
    smaller = mask.clone()
    smaller[0, 36, 36] = False
    with pytest.raises(ValueError, match=r"was recorded with mask [0-9a-f]{12}, this edit has [0-9a-f]{12}; wanted"):
        edits(video, smaller, "a circle", reference_images=red, **call)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ([1, 2], "list"),
        (torch.eye(2).to_sparse(), "torch.float32, torch.sparse_coo on cpu"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64, torch.strided on cpu"),
        (torch.zeros(2, device="meta"), "torch.float32, torch.strided on meta"),
    ],
    ids=["list", "sparse", "complex", "meta"],
)
def test_inputs_that_a_file_does_not_hold_are_refused_before_the_run(pipe, tmp_path, tensor, found):
    options: dict[str, Any] = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with pytest.raises(ValueError, match=rf"input mine is {found}; wanted a dense tensor of one of float64, "):
        with kvlock.record(pipe, tmp_path / "x", tiny.source_latents(), tiny.masks(pipe), **options) as session:
            session.keep_inputs({"mine": tensor}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_edit_is_that_of_the_recorded_video_and_source_prompt(tmp_path):
    mini = tiny.miniature()
    edits, mask = kvlock.KVLockPipeline(mini, CONFIG), tiny.pixel_mask()
    video = torch.rand(tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3, generator=torch.Generator().manual_seed(1))
    call: dict[str, Any] = {"num_inference_steps": 5, "source_prompt": "a star"}
    seed = lambda: torch.Generator().manual_seed(0)
    found = edits.record(tmp_path / "source", video, mask, generator=seed(), about={"seed": 7, "mine": 1}, **call)
    assert found.about["seed"] == 0 and found.about["mine"] == 1
    assert torch.equal(found.inputs["frames"], video) and torch.equal(found.inputs["mask"], mask)
    one_shot = edits(video, mask, "a circle", generator=seed(), **call)
    again = edits(video, mask, "a circle", generator=seed(), recording=found, **(call | {"source_prompt": ""}))
    assert torch.equal(one_shot.frames, again.frames)
    with pytest.raises(ValueError, match=r"was recorded with source_prompt a star, this edit has a square; wanted"):
        edits(video, mask, "a circle", recording=found, **(call | {"source_prompt": "a square"}))
    with pytest.raises(ValueError, match=r"was recorded with video [0-9a-f]{12}, this edit has [0-9a-f]{12}; wanted"):
        edits(video.flip(0), mask, "a circle", recording=found, **call)
    with pytest.raises(ValueError, match=r"recording is a str; wanted a kvlock.Recording"):
        edits(video, mask, "a circle", recording="source", **call)
    with pytest.raises(ValueError, match=r"guidance_scale cannot be given: KVLockPipeline decides it"):
        edits.record(tmp_path / "other", video, mask, guidance_scale=1.0, **call)
    with pytest.raises(ValueError, match=r"about=.*cannot be written: .*; wanted JSON types"):
        edits.record(tmp_path / "other", video, mask, about={"x": float("nan")}, **call)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_manifest_says_what_the_rows_belong_to(pipe, recording):
    fields = json.loads((recording.path / "manifest.json").read_text())
    assert fields["format"] == 1 and fields["recorded_steps"] == fields["locked_steps"] == [3, 4, 5]
    assert fields["config"] == json.loads(json.dumps(CONFIG.to_dict())) and fields["config"]["kappa"] == 3
    assert fields["mask"] == hash_of(tiny.masks(pipe).index)
    assert fields["source_latents"] == hash_of(tiny.source_latents())
    assert fields["source_prompt"] == hash_of(tiny.SOURCE_PROMPT)
    for name in ("mask", "source_latents", "source_prompt", "control_hidden_states", "noise"):
        assert len(fields[name]) == 64, name
    names = {"steps", "first_step", "sigmas", "scheduler", "shift", "layers", "point", "dtypes", "rows", "weights"}
    assert names <= set(fields)
    assert {path.name for path in recording.path.iterdir()} == {*fields["files"], "manifest.json"}
    assert all(len(entry["sha256"]) == 64 for entry in fields["files"].values())
