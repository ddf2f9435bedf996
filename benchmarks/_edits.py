"""What the benchmark of whole edits edits: the embedded miniature, and Wan's shapes with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvlock
from kvlock.mini import models, scenes

SHAPES = {"1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
          "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}}  # fmt: skip
HEAD_DIM = 128
VIDEO = 81, 480, 832  # frames, rows and columns
PROMPT = 512, 4096  # tokens, and the channels of their embeddings
NEEDED = {"14b": 60e9}  # bytes of device memory, with rows in bf16 there


class Edit(NamedTuple):
    """A pipeline with what it edits."""

    model: str
    pipe: Any
    masks: kvlock.Masks
    source: Tensor
    embeds: Tensor  # of the source prompt
    arguments: dict[str, Any]  # of the pipeline's call


def named(shape: str) -> str:
    """The model of this shape, as rows call it."""
    return f"wan-{shape}, random" if shape in SHAPES else shape


def miniature(device: str) -> Edit:
    """The embedded model, in fp32."""
    pipe = kvlock.mini.load().to(device)
    scene = scenes.sample(seed=1_000_015)
    video, mask = scenes.render(scene), scenes.box_mask(scene)
    grey = video.masked_fill(mask[..., None], 0.5).movedim(-1, 1)[None]
    frames, height, width = mask.shape
    return Edit(
        named("miniature"), pipe, kvlock.Masks.from_pixels(mask, pipe), kvlock.encode_source(pipe, video),
        pipe.encode_prompt(scene.caption, do_classifier_free_guidance=False)[0],
        {"prompt": "a white star", "video": grey, "mask": mask[None, :, None].float(), "height": height,
         "width": width, "num_frames": frames},
    )  # fmt: skip


def transformer(device: str, sizes: dict[str, int]) -> Any:
    """One of Wan2.1-T2V, in bf16; random weights, and none on the meta device."""
    from diffusers import WanTransformer3DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return WanTransformer3DModel(attention_head_dim=HEAD_DIM, **sizes)
    finally:
        torch.set_default_dtype(default)


def latents() -> tuple[int, ...]:
    """The sizes of one sample's latents."""
    frames, height, width = VIDEO
    return 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8


def wan(device: str, shape: str) -> Edit:
    """A transformer of the shape of Wan2.1-T2V in bf16 on noise, with nothing encoded and nothing decoded."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    model = transformer(device, SHAPES[shape])
    tokenizer, (frames, height, width) = models.build_tokenizer(), VIDEO
    tokens, channels = PROMPT
    config = UMT5Config(vocab_size=len(tokenizer), d_model=channels, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(),  # on the CPU: only its strides are asked for
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=model,
    )
    pipe.text_encoder.to(device, torch.bfloat16)
    mask = torch.zeros(frames, height, width, dtype=torch.bool)
    mask[:, height // 4 : 13 * height // 20, width // 4 : 17 * width // 26] = True
    source = torch.randn(latents(), device=device)
    source_embeds, prompt, negative = torch.randn(3, 1, tokens, channels, device=device, dtype=torch.bfloat16)
    return Edit(
        named(shape), pipe, kvlock.Masks.from_pixels(mask, pipe), source, source_embeds,
        {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "height": height, "width": width,
         "num_frames": frames},
    )  # fmt: skip


EDITS: dict[str, Callable[[str], Edit]] = {
    "miniature": miniature, **{shape: partial(wan, shape=shape) for shape in SHAPES},
}  # fmt: skip
