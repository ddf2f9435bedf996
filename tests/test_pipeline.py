"""KVLockPipeline: what it hands to the pipeline, what it hands back, and what it refuses."""

from __future__ import annotations

import warnings

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from diffusers.callbacks import PipelineCallback
from tiny import FRAMES, SIZE

import kvlock
from kvlock.adapters.vae import decode, encode, repair_stride
from kvlock.mini.models import build_vae

VIDEO = torch.rand(FRAMES, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
MASK = tiny.pixel_mask()
RED = PIL.Image.new("RGB", (32, 48), "red")


@pytest.fixture(scope="module")
def pipe():
    return tiny.miniature()


def edit(pipe, preset="kv-lock", video=VIDEO, mask=MASK, **kwargs):
    settings = {"tau": 10.0} if preset == "kv-lock" else {}  # far above the variances of random weights: alpha < 1
    config = kvlock.preset(preset, **(settings | kwargs.pop("config", {})))
    arguments = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "source_prompt": "a star"}
    editor = kvlock.KVLockPipeline(pipe, config, kernel=kwargs.pop("kernel", "hooks"))
    arguments |= kwargs
    out = editor(video, mask, "a red circle", **arguments)
    assert out.masks.background_rows > 0
    if config.locks:
        tiny.assert_locked(out.trace.rows(), config)
    return out


def test_plain_is_the_pipeline_on_the_grey_filled_video(pipe):
    filled = torch.where(MASK[..., None], 0.5, VIDEO).movedim(-1, 1)[None]
    expected = pipe(
        prompt="a red circle",
        video=filled,
        mask=MASK[None, :, None].float(),
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    assert torch.equal(edit(pipe, "plain").frames, expected.movedim(1, -1))


@pytest.mark.parametrize(
    "kernel, operator",
    [("hooks", "kv_lerp_"), ("fused", "qk_norm_rope_kv_lerp_"), ("backend", "kv_lerp_attention_")],
)
def test_the_lock_acts_where_the_kernel_says(pipe, kernel, operator):
    with tiny.Operators() as operators:
        edit(pipe, config={"kappa": 3}, kernel=kernel)
    assert {name for name in operators.locks if "lerp" in name} == {operator}


def test_an_unknown_kernel_is_refused_before_the_first_edit(pipe):
    with pytest.raises(ValueError, match=r"kernel='triton'.*'hooks', 'fused', 'backend'"):
        kvlock.KVLockPipeline(pipe, kernel="triton")


def test_a_locked_edit_differs_from_the_plain_one_and_says_how_it_was_steered(pipe):
    locked = edit(pipe, config={"kappa": 3})
    assert not torch.equal(locked.frames, edit(pipe, "plain").frames)
    assert locked.frames.shape == VIDEO.shape and locked.frames.dtype == torch.float32
    ratios = [row["fusion_ratio"][0] for row in locked.trace.rows()]
    assert ratios[:2] == [0, 0] and all(0 < ratio < 1 for ratio in ratios[2:])


def test_vace_never_sees_the_object_to_be_replaced(pipe):
    other = VIDEO.clone()
    other[MASK] = 0.9
    seen = []
    for video in (VIDEO, other):
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["control_hidden_states"]), with_kwargs=True
        )
        edit(pipe, "plain", video=video, num_inference_steps=1)
        handle.remove()
    assert torch.equal(seen[0], seen[2])


def test_a_pixel_composite_is_the_source_outside_the_mask_bit_for_bit(pipe):
    out = edit(pipe, "fixed-0.5", composite="pixel")
    assert torch.equal(out.frames[~MASK], VIDEO[~MASK])
    assert not torch.equal(out.frames[MASK], VIDEO[MASK])
    trace = out.trace.to_dict()
    assert trace["config"]["composite"] == trace["summary"]["composite"] == "pixel"


def test_a_latent_composite_changes_the_background_only_towards_the_source(pipe):
    free, pasted = edit(pipe, "fixed-0.5").frames, edit(pipe, "fixed-0.5", composite="latent").frames
    round_trip = decode(pipe, encode(pipe, VIDEO.movedim(-1, 1) * 2 - 1)).movedim(1, -1) / 2 + 0.5
    far = lambda frames: (frames - round_trip)[~MASK].square().mean()
    assert far(pasted) < far(free)


def test_a_run_that_is_stopped_has_no_latent_composite_and_says_so(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return tensors

    whole = edit(pipe, "fixed-0.5", composite="latent")
    assert whole.trace.to_dict()["summary"]["composite"] == "latent"
    message = 'composite="latent" was not applied: the run was stopped after 4 steps, before its last one'
    with pytest.warns(UserWarning, match=message):
        stopped = edit(pipe, "fixed-0.5", composite="latent", callback_on_step_end=stop)
    assert torch.equal(stopped.frames, edit(pipe, "fixed-0.5", callback_on_step_end=stop).frames)
    summary = stopped.trace.to_dict()["summary"]
    assert (summary["steps"], summary["composite"]) == (4, "none")
    pasted = edit(pipe, "fixed-0.5", composite="pixel", callback_on_step_end=stop)
    assert torch.equal(pasted.frames[~MASK], VIDEO[~MASK]) and pasted.trace.composite == "pixel"


def test_reference_images_take_their_place_in_front_and_leave_the_video_length_alone(pipe):
    image = PIL.Image.fromarray(np.full((64, 48, 3), 200, dtype=np.uint8))
    out = edit(pipe, reference_images=[image], config={"kappa": 3})
    assert out.frames.shape == VIDEO.shape
    assert out.masks.reference_frames == 1
    assert int(out.masks.index.min()) >= out.masks.tokens[0].numel()


def test_a_cut_out_reference_is_laid_on_white(pipe, tmp_path):
    cut_out, on_white = PIL.Image.new("RGBA", (48, 64), (200, 30, 30, 255)), PIL.Image.new("RGB", (48, 64), "white")
    cut_out.paste((0, 0, 0, 0), (0, 0, 24, 64))
    on_white.paste((200, 30, 30), (24, 0, 48, 64))
    found, expected = (edit(pipe, "plain", reference_images=[image]).frames for image in (cut_out, on_white))
    assert torch.equal(found, expected)
    arguments = {"reference_images": [[cut_out]], "num_inference_steps": 3, "source_prompt": "a star"}
    recording = kvlock.KVLockPipeline(pipe).record(tmp_path / "source", VIDEO, MASK, **arguments)
    assert torch.equal(recording.inputs["reference_0"], torch.from_numpy(np.array(on_white)))


def test_references_in_a_list_for_their_one_video_are_that_list(pipe):
    flat, nested = (edit(pipe, "plain", reference_images=images) for images in ([RED, RED], [[RED, RED]]))
    assert flat.masks.reference_frames == nested.masks.reference_frames == 2
    assert torch.equal(nested.frames, flat.frames)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[RED], [RED]], "reference_images has lists for 2 videos; wanted one"),
        ([RED, [RED]], "reference_images holds a list; wanted PIL images"),
        ([[RED, np.array(RED)]], "reference_images holds a ndarray; wanted PIL images"),
        ("red.png", "reference_images holds a str; wanted PIL images"),
    ],
    ids=["two-videos", "half-nested", "array", "path"],
)
def test_references_of_another_form_are_refused_by_name(pipe, images, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, "plain", reference_images=images)


def without_masks(kind):
    """A pipeline that takes no mask, with the miniature's words."""
    mini = tiny.miniature()
    pipe = kind(
        tokenizer=mini.tokenizer,
        text_encoder=mini.text_encoder,
        vae=mini.vae,
        scheduler=mini.scheduler,
        transformer=tiny.transformer(text_dim=64),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [WanPipeline, WanVideoToVideoPipeline])
def test_pipelines_without_a_mask_argument_edit_too(kind):
    pipe = without_masks(kind)
    out = edit(pipe, "fixed-0.5")
    assert out.frames.shape == VIDEO.shape
    assert not torch.equal(out.frames, edit(pipe, "plain").frames)


@pytest.fixture
def attached(monkeypatch):
    """What KVLockPipeline hands to `attach`."""
    seen = {}

    def spy(pipe, source, masks, **kwargs):
        seen.update(source=source, masks=masks, **kwargs)
        return kvlock.attach(pipe, source, masks, **kwargs)

    monkeypatch.setattr(kvlock.pipeline, "attach", spy)
    return seen


def test_the_source_is_the_original_video_with_its_own_prompt(pipe, attached):
    edit(pipe, source_prompt="a blue star", num_inference_steps=3)
    assert torch.equal(attached["source"], kvlock.encode_source(pipe, VIDEO))
    with torch.no_grad():
        expected = pipe.encode_prompt("a blue star", do_classifier_free_guidance=False, max_sequence_length=512)[0]
    assert torch.equal(attached["source_prompt_embeds"], expected)


def test_a_references_slot_of_the_source_holds_its_own_latents(pipe, attached):
    image = torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1)).mul(255).byte()
    edit(pipe, reference_images=PIL.Image.fromarray(image.numpy()), num_inference_steps=3)
    source = attached["source"]
    assert source.shape[2] == 4
    torch.testing.assert_close(source[:, :, :1], kvlock.encode_source(pipe, image[None]), rtol=1e-4, atol=1e-4)
    assert torch.equal(source[:, :, 1:], kvlock.encode_source(pipe, VIDEO))


def test_a_callback_of_the_callers_own_is_heard_beside_progress(pipe):
    heard = []
    callback = lambda pipe, step, timestep, kwargs: heard.append(step) or kwargs
    edit(pipe, "plain", num_inference_steps=2, progress=lambda *args: None, callback_on_step_end=callback)
    assert heard == [0, 1]


def test_a_diffusers_callback_gets_its_tensors_beside_progress(pipe):
    heard = []

    class Mine(PipelineCallback):
        tensor_inputs = ("latents", "prompt_embeds")

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            heard.append(sorted(callback_kwargs))
            return callback_kwargs

    edit(pipe, "plain", num_inference_steps=1, progress=lambda *args: None, callback_on_step_end=Mine())
    assert heard == [["latents", "prompt_embeds"]]


def test_a_subclass_that_only_passes_its_arguments_on_is_called_as_its_base():
    class Mine(WanVACEPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    mini = tiny.miniature()
    mine = Mine(**{name: part for name, part in mini.components.items() if part is not None})
    mine.set_progress_bar_config(disable=True)
    assert torch.equal(edit(mine, num_inference_steps=3).frames, edit(mini, num_inference_steps=3).frames)


def test_a_pipeline_that_is_not_supported_is_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="Other is not supported; supported pipelines: WanPipeline"):
        kvlock.KVLockPipeline(Other())


def test_a_config_of_another_type_is_refused(pipe):
    with pytest.raises(ValueError, match=r"config is a str; wanted a kvlock\.KVLockConfig"):
        kvlock.KVLockPipeline(pipe, "plain")


def test_an_edit_without_a_source_prompt_is_told_so_and_a_plain_one_has_no_use_for_it(pipe):
    with pytest.warns(UserWarning, match="no source prompt"):
        edit(pipe, num_inference_steps=3, source_prompt="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(pipe, "plain", num_inference_steps=1, source_prompt="")
        edit(pipe, num_inference_steps=3)


def test_progress_hears_of_every_step(pipe):
    heard = []
    edit(pipe, progress=lambda step, steps, trace: heard.append((step, steps, len(trace))))
    assert heard == [(k, 5, k + 1) for k in range(5)]


def test_trim_drops_frames_only_when_asked(pipe):
    video, mask = torch.cat([VIDEO, VIDEO[:2]]), torch.cat([MASK, MASK[:2]])
    with pytest.raises(ValueError, match=r"11 frames.*9 and 13"):
        edit(pipe, video=video, mask=mask)
    assert len(edit(pipe, "plain", video=video, mask=mask, trim=True, num_inference_steps=1).frames) == FRAMES


def test_the_stride_of_a_patchified_vae_is_repaired():
    pipe = WanVACEPipeline(**tiny.miniature().components | {"vae": build_vae()})
    assert (pipe.vae_scale_factor_spatial, pipe.video_processor.config.vae_scale_factor) == (4, 4)
    repair_stride(pipe)
    assert (pipe.vae_scale_factor_spatial, pipe.video_processor.config.vae_scale_factor) == (8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": VIDEO.numpy()}, r"video is a ndarray; wanted a tensor \[F, H, W, 3\]"),
        ({"guidance_scale": "5"}, r"guidance_scale='5' is not allowed; wanted a finite number"),
        ({"generator": 3}, r"generator is a int; wanted a torch.Generator"),
        ({"video": VIDEO.movedim(-1, 1)}, r"video has shape \[9, 3, 96, 96\]"),
        ({"video": VIDEO[:0]}, r"video has shape \[0, 96, 96, 3\]"),
        ({"video": VIDEO * 255}, r"video has values from \S+ to 25\d.*\[0, 1\]"),
        ({"video": VIDEO.long()}, r"video has dtype torch.int64"),
        ({"mask": MASK[:5]}, r"mask has \[F, H, W\] = \[5, 96, 96\], the video \[9, 96, 96\]"),
        ({"mask": torch.zeros_like(MASK)}, "nothing to edit"),
        ({"mask": torch.ones_like(MASK)}, "nothing to lock"),
        ({"composite": "paste"}, "composite='paste'"),
        ({"video": VIDEO[:, :90, :90], "mask": MASK[:, :90, :90]}, "mask height is 90"),
        ({"strength": 0.5}, "WanVACEPipeline takes no argument strength"),
        ({"return_dict": False}, "return_dict cannot be given"),
        ({"height": 48, "output_type": "latent"}, "height, output_type cannot be given"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt cannot be given"),
        ({"source_prompt": None}, "source_prompt is a NoneType; wanted one str"),
        ({"num_inference_steps": 0}, "num_inference_steps=0.*>= 1"),
    ],
)
def test_bad_input_is_refused_by_name(pipe, change, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, **change)
    assert "step" not in vars(pipe.scheduler)


def test_references_are_refused_where_the_pipeline_takes_none():
    pipe = tiny.pipeline(WanPipeline)
    image = PIL.Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="takes no reference_images"):
        edit(pipe, "plain", reference_images=[image])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 1}, "num_inference_steps=1 at strength=0.8 leaves none to .*; wanted 2 or more"),
        ({"strength": 0.1}, "num_inference_steps=5 at strength=0.1 leaves none to .*; wanted 10 or more"),
        ({"strength": 0}, "strength=0 is not allowed; wanted a number > 0"),
        ({"strength": -0.5}, "strength=-0.5 is not allowed; wanted a number > 0"),
        ({"strength": "all"}, "strength='all' is not allowed; wanted a number > 0"),
        (
            {"timesteps": [900, 500, 100], "strength": 0.1},
            "timesteps of length 3 at strength=0.1 leaves none to .*; wanted 10 or more",
        ),
    ],
    ids=str,
)
def test_video_to_video_with_no_step_to_run_is_refused(settings, message):
    pipe = without_masks(WanVideoToVideoPipeline)
    with pytest.raises(ValueError, match=message):
        edit(pipe, "plain", **settings)
    assert edit(pipe, "plain", num_inference_steps=2).frames.shape == VIDEO.shape
