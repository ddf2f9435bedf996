"""`python -m kvlock.mini.train` reproduces the miniature's weights: VAE, latents, transformer with text encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import AutoencoderKLWan, WanVACEPipeline

from kvlock.mini import latents, models, quality, train_transformer, train_vae

SCENES = 5000  # of the transformer's training set


def assemble(vae: AutoencoderKLWan, miniature: train_transformer.Miniature, statistics: tuple, out: Path) -> None:
    """Write the trained parts as a `WanVACEPipeline` in fp16, which `from_pretrained` reads back as fp32."""
    mean, std = statistics
    vae.register_to_config(latents_mean=mean, latents_std=std)
    for block in [*miniature.transformer.blocks, *miniature.transformer.vace_blocks]:
        block.attn2.set_processor(train_transformer.WanAttnProcessor())
    pipe = WanVACEPipeline(
        tokenizer=models.build_tokenizer(),
        text_encoder=miniature.text_encoder,  # transformers keeps a checkpoint's dtype, diffusers reads fp16 as fp32
        vae=vae.half(),
        scheduler=models.build_scheduler(),
        transformer=miniature.transformer.half(),
    )
    pipe.save_pretrained(out)
    for file in ("model_index.json", "tokenizer/tokenizer_config.json"):
        text = (out / file).read_text(encoding="utf-8")
        # transformers 5 writes its new name for the class and reads the old one, transformers 4 knows the old one only.
        (out / file).write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvlock.mini.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, latents and the result")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=4000, help="of the transformer")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    vae = train_vae.train(args.out, args.vae_steps, device=args.device)
    print(f"VAE round trip of 16 held-out videos: {quality.round_trip(vae.to('cpu'), 16).whole:.2f} dB")
    vae.to(args.device)
    data = latents.build(vae, args.out / "latents", SCENES)
    miniature = train_transformer.train(data, args.out, args.steps, device=args.device)
    assemble(vae.to("cpu"), miniature.to("cpu"), latents.statistics(data["latents"]), args.out / "weights")
    print(f"wrote {args.out / 'weights'}")


if __name__ == "__main__":
    main()
