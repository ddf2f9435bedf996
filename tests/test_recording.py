"""A recording of the source: the same edit without a source pass, and a refusal where it belongs to something else."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline

import kvlock
from kvlock import KVLockConfig, Recording, Store
from kvlock.adapters.kernels import KERNELS
from kvlock.cost import ModelSizes, estimate
from kvlock.step_file import HEADER_BYTES

STEPS = 6
CONFIG = KVLockConfig(kappa=3, window=3, tau=0.6)


def edit(pipe: Any, config: KVLockConfig = CONFIG, *, masks: Any = None, source: Any = None, **options: Any):
    """The final latents of an attached call, and its trace; with `steps` and `seed` of the call among the options."""
    call = {name: options.pop(name) for name in ("steps", "seed", "video") if name in options}
    masks = tiny.masks(pipe) if masks is None else masks
    source = tiny.source_latents() if source is None else source
    if "recording" not in options:
        options["source_prompt_embeds"] = tiny.SOURCE_PROMPT
    with kvlock.attach(pipe, source, masks, config=config, **options) as session:
        latents = tiny.call(pipe, **({"steps": STEPS} | call))
    return latents, session.trace.rows()


def make(pipe: Any, path: Any, config: KVLockConfig = CONFIG, *, steps: int = STEPS, **options: Any) -> Recording:
    options = {"source_prompt_embeds": tiny.SOURCE_PROMPT} | options
    with kvlock.record(pipe, path, tiny.source_latents(), tiny.masks(pipe), config=config, **options) as session:
        tiny.call(pipe, steps=steps)
    forwards = [row["forwards"] for row in session.trace.rows()]
    locked = config.locked_steps(steps, start=steps - len(forwards))
    assert sum(forwards) == len(locked) and set(forwards) == {0, 1}
    return Recording(path)


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
        assert len(found._checks) == len(found.steps) == 3
        tiny.call(pipe, steps=STEPS)
    file = found.path / "step-0004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"step-0004.safetensors has checksum [0-9a-f]{12}; wanted [0-9a-f]{12}, as"):
        edit(pipe, recording=found)


def test_verifying_stops_with_the_session(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    found = make(pipe, tmp_path / "source.kvlock")
    options: dict[str, Any] = {"config": CONFIG, "recording": found}
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
        pass
    assert all(check.done() for _, check in found._checks.values())
    edit(pipe, recording=found)


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


class Other(NamedTuple):
    """An edit that differs from the recorded one in one field."""

    field: str
    recorded: str
    found: str
    kind: type = WanVACEPipeline
    schedule: tuple[str, float] = ("euler", 3.0)
    pipeline: dict[str, Any] = {}  # noqa: RUF012 - never changed
    edit: dict[str, Any] = {}  # noqa: RUF012
    mask: dict[str, Any] = {}  # noqa: RUF012


OTHERS = {
    "class": Other("transformers", "['WanVACETransformer3DModel']", "['WanTransformer3DModel']", kind=WanPipeline),
    "weights": Other("weights", "['", "['", pipeline={"seed": 1}),
    "scheduler": Other(
        "scheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", schedule=("unipc", 3.0)
    ),
    "shift": Other("shift", "3.0", "5.0", schedule=("euler", 5.0)),
    "steps": Other("steps", "6", "7", edit={"steps": 7}),
    "window": Other("locked_steps", "[3, 4, 5]", "[2, 3, 4, 5]", edit={"config": KVLockConfig(kappa=4, window=3)}),
    "layers": Other(
        "layers", "['0.blocks.0', '0.blocks.1']", "['0.blocks.0', '0.blocks.1', '0.vace_blocks.0', '0.vace_blocks.1']",
        edit={"config": KVLockConfig(kappa=3, window=3, control_blocks=True)},
    ),
    "point": Other("point", "before RoPE", "after RoPE", edit={"kernel": "backend"}),
    "mask": Other("background_rows", "60", "96", mask={"dilate_tokens": 0},
                  edit={"config": KVLockConfig(kappa=3, window=3, dilate_tokens=0)}),
    "source": Other("source_latents", "", "", edit={"source": tiny.rand(1, *tiny.LATENT, seed=6)}),
    "size": Other("latents", "[16, 3, 12, 12]", "[16, 3, 12, 14]", edit={"source": tiny.rand(1, 16, 3, 12, 14)}),
    "source-prompt": Other("source_prompt", "", "", edit={"source_prompt_embeds": tiny.SOURCE_PROMPT + 1}),
    "vace-context": Other("control_hidden_states", "", "", edit={"video": torch.zeros(1, tiny.FRAMES, 3, 96, 96)}),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_an_edit_that_differs_is_refused_with_the_field_and_both_values(recording, other):
    pipe = tiny.pipeline(other.kind, **other.pipeline)
    pipe.scheduler = tiny.scheduler(*other.schedule)
    masks = tiny.masks(pipe, **other.mask)
    with pytest.raises(ValueError) as error:
        edit(pipe, masks=masks, recording=recording, **other.edit)
    message = str(error.value)
    assert f"source.kvlock was recorded with {other.field} {other.recorded}" in message
    assert f", this edit has {other.found}" in message and "; wanted " in message
    assert tiny.leftovers(pipe) == []
    if not other.recorded:  # hashes
        recorded, found = message.split(f"with {other.field} ")[1].split("; wanted")[0].split(", this edit has ")
        assert len(recorded) == len(found) == 12 and recorded != found


def test_a_mask_of_the_same_size_elsewhere_is_another_mask(pipe, recording):
    moved = kvlock.Masks.from_pixels(tiny.pixel_mask().roll((16, 16), (1, 2)), pipe)
    assert moved.background_rows == tiny.masks(pipe).background_rows
    with pytest.raises(ValueError, match=r"recorded with mask [0-9a-f]{12}, this edit has [0-9a-f]{12}; wanted them"):
        edit(pipe, masks=moved, recording=recording)


def test_another_dtype_is_refused_by_name(recording):
    pipe = tiny.pipeline(WanVACEPipeline)
    pipe.transformer.bfloat16()
    wanted = r"recorded with dtypes \['torch.float32'\], this edit has \['torch.bfloat16'\]"
    with pytest.raises(ValueError, match=wanted):
        edit(pipe, recording=recording)


def scale_a_weight(transformer: Any) -> None:
    transformer.blocks[1].attn1.to_k.weight.data.mul_(1.001)


def put_an_adapter_on(transformer: Any) -> None:
    projection = transformer.blocks[1].attn1.to_q
    projection.lora_A = torch.nn.Linear(24, 2, bias=False)  # as peft's layers have them


def scale_an_adapter(transformer: Any) -> None:
    transformer.blocks[1].attn1.to_q.scaling = {"default": 0.5}


@pytest.mark.parametrize("change", [scale_a_weight, put_an_adapter_on, scale_an_adapter])
def test_a_model_changed_afterwards_is_another_one(recording, change):
    pipe = tiny.pipeline(WanVACEPipeline)
    edit(pipe, recording=recording)
    change(pipe.transformer)
    with pytest.raises(ValueError, match=r"recorded with weights "):
        edit(pipe, recording=recording)


def test_weights_out_of_reach_are_refused(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    pipe.transformer.proj_out.weight = torch.nn.Parameter(pipe.transformer.proj_out.weight.to("meta"))
    with pytest.raises(ValueError, match=r"has its proj_out.weight offloaded out of reach.*model or group offload"):
        make(pipe, tmp_path / "source.kvlock")
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


@pytest.mark.parametrize(("part", "same"), [(0.009, True), (0.011, False)])
def test_what_another_machine_rounds_otherwise_is_the_same_source(pipe, recording, part, same):
    source, change = tiny.source_latents(), tiny.rand(1, *tiny.LATENT, seed=9)
    rounded = source + part * change * source.norm() / change.norm()
    if same:
        edit(pipe, source=rounded, recording=recording)
        return
    with pytest.raises(ValueError, match=r"recorded with source_latents "):
        edit(pipe, source=rounded, recording=recording)


def test_noise_that_follows_from_a_rounded_source_is_no_other_seed(tmp_path, recwarn):
    pipe = tiny.pipeline(WanVideoToVideoPipeline)  # its noise is what the source leaves of its first latents
    found = make(pipe, tmp_path / "source.kvlock")
    edit(pipe, source=tiny.source_latents() * (1 + 1e-5), recording=found)
    assert not [warning for warning in recwarn if "was noised with" in str(warning.message)]


def test_the_backend_cannot_be_chosen_for_rows_recorded_before_rope(pipe, recording):
    with pytest.raises(ValueError, match=r"recorded with point before RoPE, this edit has after RoPE"):
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), config=CONFIG, recording=recording):
            pipe.transformer.set_attention_backend("kvlock")
    assert tiny.leftovers(pipe) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recording": "source.kvlock"}, "recording is a str; wanted a kvlock.Recording"),
        ({"store": Store("int8")}, "is for a source pass, and a recording has its rows already; leave it out"),
        ({"config": KVLockConfig(source="batch")}, 'a recording wants source="store"'),
    ],
)
def test_what_does_not_go_with_a_recording_is_refused(pipe, recording, options, message):
    with pytest.raises(ValueError) as error:
        edit(pipe, **({"recording": recording} | options))
    assert message in str(error.value)
    assert tiny.leftovers(pipe) == []


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


def test_the_manifest_says_what_the_rows_belong_to(recording):
    fields = json.loads((recording.path / "manifest.json").read_text())
    assert fields["format"] == 1 and fields["recorded_steps"] == fields["locked_steps"] == [3, 4, 5]
    for name in ("mask", "source_latents", "source_prompt", "control_hidden_states", "noise"):
        assert len(fields[name]) == 64, name
    names = {"steps", "first_step", "sigmas", "scheduler", "shift", "layers", "point", "dtypes", "rows", "weights"}
    assert names <= set(fields)
    assert {path.name for path in recording.path.iterdir()} == {*fields["files"], "manifest.json"}
    assert all(len(entry["sha256"]) == 64 for entry in fields["files"].values())


def test_a_recording_is_made_by_one_call_with_one_schedule(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    options = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with pytest.raises(ValueError, match=r"step 3 of .* is recorded already; wanted one call of the pipeline"):
        with kvlock.record(pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options):
            tiny.call(pipe, steps=STEPS)
            tiny.call(pipe, steps=STEPS)
    with pytest.raises(ValueError, match=r"is being recorded with steps 6, then with 8; wanted one"):
        with kvlock.record(pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options):
            tiny.call(pipe, steps=STEPS)
            tiny.call(pipe, steps=8)
    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        pipe._interrupt = step == STEPS - 2  # as diffusers has it stopped
        return kwargs

    with pytest.raises(ValueError, match=r"a is not whole: the call of the pipeline did not come to its end"):
        with kvlock.record(pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options):
            tiny.call(pipe, steps=STEPS, callback_on_step_end=stop)
    with pytest.raises(ValueError, match=r"nothing was recorded for .*a: no step of a run was locked"):
        with kvlock.record(pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options):
            pass
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": kvlock.preset("plain")}, "fusion='off' with source='store' stores no rows"),
        ({"config": KVLockConfig(source="batch")}, "source='batch' stores no rows"),
        ({"store": Store(place="host")}, "place='host' of the store: a recording is its own place"),
        ({"config": 3}, "config is a int; wanted a kvlock.KVLockConfig"),
    ],
)
def test_settings_that_record_nothing_are_refused(pipe, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        with kvlock.record(pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options):
            pass
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []
