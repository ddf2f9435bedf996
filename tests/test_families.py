"""Tests of the table of pipelines and transformers."""

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanTransformer3DModel, WanVACEPipeline, WanVACETransformer3DModel

from kvlock.adapters.families import FAMILIES, PIPELINES, check_pipeline


def test_every_pipeline_runs_a_transformer_of_the_table():
    assert set(PIPELINES.values()) == set(FAMILIES)


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
@pytest.mark.parametrize(
    "pipeline, transformer", [(WanPipeline, WanVACETransformer3DModel), (WanVACEPipeline, WanTransformer3DModel)]
)
def test_a_pipeline_with_the_transformer_of_another_is_refused(pipeline, transformer, part):
    pipe = tiny.pipeline(pipeline)
    check_pipeline(pipe)
    setattr(pipe, part, tiny.transformer(transformer))
    with pytest.raises(ValueError, match=f"{pipeline.__name__} runs a .*; found a {transformer.__name__}"):
        check_pipeline(pipe)


def test_a_compiled_transformer_is_known_by_the_one_inside():
    pipe = tiny.pipeline(WanPipeline)
    pipe.transformer = torch.compile(pipe.transformer)
    check_pipeline(pipe)
    pipe.transformer = torch.compile(tiny.transformer(WanVACETransformer3DModel))
    with pytest.raises(ValueError, match="WanPipeline runs a WanTransformer3DModel; found a WanVACETransformer3DModel"):
        check_pipeline(pipe)
