"""A recording is refused where it belongs to something else, by the field that differs and with both values."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from recordings import CONFIG, STEPS, edit, make

import kvlock
from kvlock import KVLockConfig, Recording, Store
from kvlock.adapters import belongings
from kvlock.manifest import hash_of


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(WanVACEPipeline)


@pytest.fixture(scope="module")
def recording(pipe, tmp_path_factory):
    return make(pipe, tmp_path_factory.mktemp("recording") / "source.kvlock")


class Other(NamedTuple):
    """An edit that differs from the recorded one in one field."""

    field: str
    recorded: str
    found: str
    kind: type = WanVACEPipeline
    schedule: tuple[str, float] = ("euler", 3.0)
    pipeline: dict[str, Any] = {}  # noqa: RUF012 - never changed
    edit: dict[str, Any] = {}  # noqa: RUF012 - never changed
    mask: dict[str, Any] = {}  # noqa: RUF012 - never changed


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


@pytest.mark.parametrize(("change", "same"), [(0.15, True), (0.25, False)])
def test_a_source_that_shows_something_else_in_one_token_is_another_source(pipe, recording, change, same):
    source = tiny.source_latents()
    source[:, 3, 1, 2, 3] += change * source[:, 3].square().mean().sqrt()  # a sixteenth of a mean square, so a quarter
    with nullcontext() if same else pytest.raises(ValueError, match=r"recorded with source_latents "):
        edit(pipe, recording=recording, source=source)


def test_rows_of_another_kernel_are_refused(tmp_path):
    """In half precision a source that runs through the fused pass has other keys than one that does not."""
    pipe = tiny.pipeline(WanPipeline)
    found = make(pipe, tmp_path / "source.kvlock")
    with pytest.raises(ValueError, match=r"recorded with kernel hooks, this edit has fused; wanted them alike"):
        edit(pipe, recording=found, kernel="fused")
    fused = make(pipe, tmp_path / "fused.kvlock", kernel="fused")
    fewer = KVLockConfig(kappa=3, window=3, tau=0.6, layers=(1,))
    with pytest.raises(ValueError, match=r"recorded with layers \['0.blocks.0', '0.blocks.1'\], this edit has \['0.bl"):
        edit(pipe, fewer, recording=fused, kernel="fused")


def test_noise_that_was_rounded_is_refused_where_the_edit_has_it_whole(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    pipe.transformer.bfloat16()
    always, later = (KVLockConfig(fusion=0.5, kappa=kappa, window=3) for kappa in (1.0, 2))
    found = make(pipe, tmp_path / "source.kvlock", always)
    assert torch.equal(edit(pipe, always, recording=found)[0], edit(pipe, always)[0])
    with pytest.raises(ValueError, match=r"recorded with noise_dtype torch.bfloat16, this edit has torch.float32"):
        edit(pipe, later, recording=found)


def test_steps_that_the_recording_skipped_are_refused_at_the_first_call(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    pipe.register_modules(transformer_2=tiny.transformer(seed=9))
    pipe.register_to_config(boundary_ratio=0.6)
    found = make(pipe, tmp_path / "source.kvlock", KVLockConfig(kappa=4, window=3, tau=0.6), counted=False)
    assert found.steps == [2, 3] and found.fields["locked_steps"] == [2, 3, 4, 5]  # another transformer, another window
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"recorded_steps \[2, 3\], this edit has \[2, 3, 4, 5\]; wanted no more than"):
        edit(pipe, KVLockConfig(kappa=4, window=3, fusion=0.5), recording=found)
    assert len(calls) == 1


def test_autocast_is_part_of_the_model(pipe, recording):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"recorded with autocast None, this edit has torch.bfloat16; wanted them"):
            edit(pipe, recording=recording)


def test_a_setting_among_the_conditions_is_no_matter_of_rounding(pipe, recording):
    options: dict[str, Any] = {"config": CONFIG, "recording": recording}
    with pytest.raises(ValueError, match=r"recorded with control_hidden_states_scale [0-9a-f]{12}, this edit has "):
        with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **options):
            tiny.call(pipe, steps=STEPS, conditioning_scale=1.01)


LATENTS = torch.ones(1, 2, 3, 4, 5)
ODD = {
    "complex": (LATENTS + 0j, LATENTS + 1j),
    "bool": (torch.zeros(1, 2, 500, dtype=torch.bool), torch.arange(1000).view(1, 2, 500) == 7),
    "integers": (100 * LATENTS.int(), 101 * LATENTS.int()),
    "one-number": (torch.tensor(100.0), torch.tensor(101.0)),
    "a-vector": (torch.ones(15), torch.ones(15) * 1.01),
    "infinite": (LATENTS * torch.inf, LATENTS),
    "infinite-in-a-channel": tuple(x * LATENTS.index_fill(2, torch.tensor(0), torch.inf) for x in (1, 9)),
    "no-numbers": (LATENTS, LATENTS * torch.nan),
    "empty-of-another-dtype": (torch.empty(1, 2, 0, 4, 5), torch.empty(1, 2, 0, 4, 5, dtype=torch.float64)),
}


@pytest.mark.parametrize(("recorded", "found"), ODD.values(), ids=ODD)
def test_what_is_not_computed_is_compared_exactly(recorded, found):
    noted = Recording.__new__(Recording)
    noted.path, noted.fields, noted._tensors = Path("source.kvlock"), {"x": hash_of(recorded)}, {"x": recorded}
    noted.agree_on_tensor("x", recorded.clone())
    with pytest.raises(ValueError, match=r"source.kvlock was recorded with x "):
        noted.agree_on_tensor("x", found)


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


def halve_the_precision(transformer: Any) -> None:
    transformer.bfloat16()


@pytest.mark.parametrize(
    ("change", "field"), [(scale_a_weight, "weights"), (scale_an_adapter, "weights"), (halve_the_precision, "dtypes")]
)
def test_a_model_changed_inside_the_block_is_another_one_at_the_next_call(recording, change, field):
    pipe = tiny.pipeline(WanVACEPipeline)
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), config=CONFIG, recording=recording):
        tiny.call(pipe, steps=STEPS)
        change(pipe.transformer)
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match=rf"recorded with {field} "):
            tiny.call(pipe, steps=STEPS)


def test_a_recording_belongs_to_the_model_that_made_it_and_not_to_the_one_before_the_call(tmp_path):
    pipe, options = tiny.pipeline(WanPipeline), {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options):
        pipe.transformer.load_state_dict(tiny.transformer(seed=3).state_dict())
        tiny.call(pipe, steps=STEPS)
    found = Recording(tmp_path / "a")
    assert torch.equal(edit(pipe, recording=found)[0], edit(pipe)[0])
    with pytest.raises(ValueError, match=r"recorded with weights "):
        edit(tiny.pipeline(WanPipeline), recording=found)


def test_weights_are_looked_at_once_a_run(monkeypatch, pipe, recording):
    looked: list[Any] = []
    original = belongings.fingerprint
    monkeypatch.setattr(belongings, "fingerprint", lambda module: looked.append(module) or original(module))
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), config=CONFIG, recording=recording):
        assert len(looked) == 1
        for run in range(2):
            tiny.call(pipe, steps=STEPS)
            assert len(looked) == 2 + run


def test_a_transformer_of_other_settings_is_refused_by_the_one_that_differs(recording):
    pipe = tiny.pipeline(WanVACEPipeline)
    pipe.transformer.register_to_config(new_in_a_later_version=True)
    edit(pipe, recording=recording)
    pipe.transformer.register_to_config(eps=0.5)
    with pytest.raises(ValueError, match=r"recorded with setting 0.eps 1e-06, this edit has 0.5; wanted them alike"):
        edit(pipe, recording=recording)


def test_weights_out_of_reach_are_refused(tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    pipe.transformer.proj_out.weight = torch.nn.Parameter(pipe.transformer.proj_out.weight.to("meta"))
    with pytest.raises(ValueError, match=r"has its proj_out.weight offloaded out of reach.*model or group offload"):
        make(pipe, tmp_path / "source.kvlock")
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


@pytest.mark.parametrize(("part", "same"), [(0.02, True), (0.08, False)])
def test_what_another_machine_rounds_otherwise_is_the_same_source(pipe, recording, part, same):
    rounded = tiny.source_latents() * (1 + part * tiny.rand(1, *tiny.LATENT, seed=9).clamp(-2, 2))
    with nullcontext() if same else pytest.raises(ValueError, match=r"recorded with source_latents "):
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
