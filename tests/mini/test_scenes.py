"""The miniature's world: what is rendered is what the caption says and what the mask covers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import miniature

from kvlock.mini import latents, quality, scenes

SEEDS = range(10**6, 10**6 + 40)


def test_a_seed_gives_one_scene_and_seeds_differ():
    assert scenes.sample(3) == scenes.sample(3)
    assert len({scenes.sample(seed) for seed in SEEDS}) == len(SEEDS)


def test_forty_scenes_show_every_shape_colour_background_and_direction():
    drawn = [scenes.sample(seed) for seed in SEEDS]
    assert {s.shape for s in drawn} == set(scenes.SHAPES)
    assert {s.colour for s in drawn} == set(scenes.COLOURS)
    assert {s.background for s in drawn} == set(scenes.BACKGROUNDS)
    assert {s.direction for s in drawn} == set(scenes.DIRECTIONS)


def test_the_caption_reads_as_a_sentence():
    scene = dataclasses.replace(
        scenes.sample(0), shape="circle", colour="orange", direction="left", background="striped"
    )
    assert scene.caption == "an orange circle moving left over a striped background"


@pytest.mark.parametrize("seed", list(SEEDS)[:8])
def test_the_mask_covers_the_shape_and_nothing_outside_it_depends_on_the_shape(seed):
    scene = scenes.sample(seed)
    mask = scenes.box_mask(scene)
    pictures = [scenes.render(dataclasses.replace(scene, shape=shape, colour="red")) for shape in scenes.SHAPES]
    for picture in pictures[1:]:
        assert torch.equal(picture[~mask], pictures[0][~mask])
        assert not torch.equal(picture[mask], pictures[0][mask])
    assert all(torch.equal(scenes.box_mask(dataclasses.replace(scene, shape=s)), mask) for s in scenes.SHAPES)


@pytest.mark.parametrize("seed", list(SEEDS)[:8])
def test_a_still_box_holds_the_moving_one_and_does_not_move(seed):
    scene = scenes.sample(seed)
    still, moving = scenes.box_mask(scene, still=True), scenes.box_mask(scene)
    assert torch.equal(still[0], still[-1])
    assert bool((still | ~moving).all())
    assert still.sum() > moving.sum()


def test_the_shape_stays_inside_the_picture():
    for seed in SEEDS:
        scene = scenes.sample(seed)
        centres = scene.centres()
        assert centres.min() >= scene.radius and centres.max() <= scenes.SIZE - scene.radius


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_the_judge_names_a_rendered_shape_through_noise(shape):
    scene = dataclasses.replace(scenes.sample(11), shape=shape, colour="blue")
    video = scenes.render(scene)
    video = video + 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    other = dataclasses.replace(scene, shape="star", colour="white")
    assert quality.judge(video, scenes.box_mask(scene), other) == (shape, "blue")


def test_a_request_keeps_the_way_and_changes_shape_and_colour():
    for seed in SEEDS:
        source, target = quality.request(seed)
        assert source.shape != target.shape and source.colour != target.colour
        assert torch.equal(source.centres(), target.centres()) and source.background == target.background


def test_the_control_mask_is_the_one_the_pipeline_makes():
    mask = scenes.box_mask(scenes.sample(5))
    expected = miniature().prepare_masks(mask[None, None].float(), [[]])[0]
    assert torch.equal(latents.control_mask(mask).float(), expected)
