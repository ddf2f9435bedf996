"""Training of the miniature's VACE transformer and text encoder: flow matching on cached latents, masked inpainting."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kvlock.mini import checkpoint, latents, models, scenes

BATCH = 32
WORDS = 16  # longest caption in tokens; the padding up to models.TEXT_LENGTH is folded into a bias
DROP_CAPTION = 0.12  # share of captions replaced by "", for classifier-free guidance
FOREGROUND_WEIGHT = 4.0  # of the loss inside the mask: the background is given, the shape is what must be learnt


class PaddedCrossAttention(WanAttnProcessor):
    """Cross-attention over WORDS text tokens that equals the one over TEXT_LENGTH tokens, of which most are padding.

    Every padding token has the same key and value, so P of them weigh as one whose logit is raised by log P.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.zeros(BATCH, 1, 1, WORDS)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        bias = self.bias.to(hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


class Miniature(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = models.build_text_encoder()
        self.transformer = models.build_transformer()
        self.cross_attention = PaddedCrossAttention()
        for block in [*self.transformer.blocks, *self.transformer.vace_blocks]:
            block.attn2.set_processor(self.cross_attention)

    def forward(self, x: Tensor, timestep: Tensor, ids: Tensor, lengths: Tensor, control: Tensor) -> Tensor:
        real = torch.arange(WORDS, device=ids.device) < lengths[:, None]
        text = self.text_encoder(ids, real.long()).last_hidden_state * real[..., None]
        copies = (models.TEXT_LENGTH - lengths) / (WORDS - lengths)
        self.cross_attention.bias = torch.where(real, 0.0, copies.log()[:, None])[:, None, None]
        return self.transformer(x, timestep, text, control_hidden_states=control, return_dict=False)[0]


def train(
    data: dict[str, Tensor], out: Path, steps: int, *, device: str = "cpu", save_every: int = 200
) -> Miniature:
    """Train for `steps` steps of BATCH scenes, going on from a checkpoint in `out`."""
    torch.manual_seed(0)
    model = Miniature().to(device)
    optimizers = _optimizers(model)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    ema = checkpoint.Ema(model, 0.999)
    first = checkpoint.load(out / "transformer.ckpt", model, ema, optimizers)
    mean, std = latents.statistics(data["latents"])
    shift, scale = torch.tensor(mean)[:, None, None, None], torch.tensor(std)[:, None, None, None]
    normalised = {name: (data[name].float() - shift) / scale for name in ("latents", "masked_latents", "grey")}
    captions = Captions(len(data["latents"]))
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="transformer", mininterval=20)
    for step in progress:
        warm = min(1, (step + 1) / 100) * min(1.0, 0.02 + (steps - step) / (0.6 * steps))
        for group, rate in zip((g for o in optimizers for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * warm
        g = torch.Generator().manual_seed(step)
        pick = torch.randint(len(data["latents"]), (BATCH,), generator=g)
        z, hole = normalised["latents"][pick], data["control"][pick].float()
        control = torch.cat([normalised["masked_latents"][pick], normalised["grey"].expand_as(z), hole], 1)
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=g)) / BATCH
        sigma = models.FLOW_SHIFT * u / (1 + (models.FLOW_SHIFT - 1) * u)
        noise = torch.randn(z.shape, generator=g)
        x = torch.lerp(z, noise, sigma[:, None, None, None, None])
        ids, lengths = captions.batch(pick.tolist(), g)
        weight = 1 + FOREGROUND_WEIGHT * hole.amax(1, keepdim=True)
        # At 180 tokens the backward of fused attention costs more on a CPU than the plain formula.
        with torch.autocast(torch.device(device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            v = model(x.to(device), (sigma * 1000).to(device), ids.to(device), lengths.to(device), control.to(device))
        error = (v.float() - (noise - z).to(device)) ** 2 * (weight / weight.mean()).to(device)
        loss = error.mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model, step)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoint.save(out / "transformer.ckpt", step + 1, model, ema, optimizers)
    ema.copy_to(model)
    return model.eval()


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and "blocks." in name else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class Captions:
    """Token ids of every scene's caption: whole, without some of its clauses, or empty."""

    def __init__(self, count: int) -> None:
        tokenizer = models.build_tokenizer()
        self.variants = []
        for seed in range(count):
            scene = scenes.sample(seed)
            what = f"{scenes.article(scene.colour)} {scene.colour} {scene.shape}"
            way, where = f"moving {scene.direction}", f"over a {scene.background} background"
            texts = [scene.caption, what, f"{what} {way}", f"{what} {where}", ""]
            self.variants.append([tokenizer(text).input_ids for text in texts])

    def batch(self, scene_indices: list[int], g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids [B, WORDS] and lengths [B]."""
        share = (1 - DROP_CAPTION) * torch.tensor([0.70, 0.10, 0.10, 0.10])
        share = torch.cat([share, torch.tensor([DROP_CAPTION])])
        kinds = torch.multinomial(share, len(scene_indices), True, generator=g)
        chosen = [self.variants[i][kind] for i, kind in zip(scene_indices, kinds.tolist(), strict=True)]
        ids = torch.zeros(len(chosen), WORDS, dtype=torch.long)
        for row, tokens in zip(ids, chosen, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, torch.tensor([len(tokens) for tokens in chosen])
