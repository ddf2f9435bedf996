"""The miniature's networks, built from config in diffusers' and transformers' own classes."""

from __future__ import annotations

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACETransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from kvlock.mini.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

TEXT_DIM = 64
TEXT_LENGTH = 512  # what Wan pipelines pad a prompt to
FLOW_SHIFT = 3.0


def build_vae() -> AutoencoderKLWan:
    """A 4.2M-parameter Wan VAE: 8x8 in space (a 2x2 patch and two halvings), 4 in time, 16 channels."""
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_transformer() -> WanVACETransformer3DModel:
    """A VACE transformer of six blocks and three control blocks."""
    return WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
        vace_layers=[0, 2, 4],
        vace_in_channels=96,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the miniature's world; any other word is unknown."""
    words = ["a", "an", "moving", "over", "background", *SHAPES, *COLOURS, *DIRECTIONS, *BACKGROUNDS]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A two-layer UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(build_tokenizer()),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
        )
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler that Wan2.1-VACE ships with, at shift 3."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
