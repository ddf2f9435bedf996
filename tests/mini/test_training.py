"""Training of the miniature: a stopped run goes on as if it had not stopped, and folded padding is exact."""

from __future__ import annotations

import pytest
import torch
from tiny import miniature, rand

from kvlock.mini import latents, models, scenes, train_transformer, train_vae


@pytest.fixture(scope="module")
def data():
    count = 4
    masks = [latents.control_mask(scenes.box_mask(scenes.sample(i))) for i in range(count)]
    return {
        "latents": rand(count, 16, 5, 12, 12, seed=1).half(),
        "masked_latents": rand(count, 16, 5, 12, 12, seed=2).half(),
        "control": torch.stack(masks),
        "grey": rand(16, 5, 12, 12, seed=3),
    }


@pytest.fixture
def small_batch(monkeypatch):
    monkeypatch.setattr(train_transformer, "BATCH", 2)
    monkeypatch.setattr(train_vae, "BANK", 2)
    monkeypatch.setattr(train_vae, "CROPS", 2)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.slow
def test_a_transformer_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, data, small_batch, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = train_transformer.train(data, whole, 2)

    class Stop(Exception):
        pass

    save = train_transformer.checkpoint.save

    def save_and_stop(*args):
        save(*args)
        raise Stop

    monkeypatch.setattr(train_transformer.checkpoint, "save", save_and_stop)
    with pytest.raises(Stop):
        train_transformer.train(data, parts, 2, save_every=1)
    monkeypatch.setattr(train_transformer.checkpoint, "save", save)
    assert same(train_transformer.train(data, parts, 2), expected)


def test_a_vae_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, small_batch, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = train_vae.train(whole, 2)

    class Stop(Exception):
        pass

    save = train_vae.checkpoint.save

    def save_and_stop(*args):
        save(*args)
        raise Stop

    monkeypatch.setattr(train_vae.checkpoint, "save", save_and_stop)
    with pytest.raises(Stop):
        train_vae.train(parts, 2, save_every=1)
    monkeypatch.setattr(train_vae.checkpoint, "save", save)
    assert same(train_vae.train(parts, 2), expected)


def test_folded_padding_equals_the_pipelines_512_tokens():
    pipe = miniature()
    model = train_transformer.Miniature()
    model.transformer.load_state_dict(pipe.transformer.state_dict())
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    prompt = "a red circle moving left"
    tokens = pipe.tokenizer(prompt).input_ids
    ids = torch.zeros(1, train_transformer.WORDS, dtype=torch.long)
    ids[0, : len(tokens)] = torch.tensor(tokens)
    x, control, t = rand(1, 16, 5, 12, 12, seed=1), rand(1, 96, 5, 12, 12, seed=2), torch.tensor([500.0])
    with torch.no_grad():
        folded = model(x, t, ids, torch.tensor([len(tokens)]), control)
        embeds = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]
        padded = pipe.transformer(x, t, embeds, control_hidden_states=control, return_dict=False)[0]
    torch.testing.assert_close(folded, padded, rtol=1e-4, atol=1e-4)


def test_every_caption_of_the_world_is_in_the_vocabulary():
    tokenizer = models.build_tokenizer()
    for seed in range(200):
        assert tokenizer.unk_token_id not in tokenizer(scenes.sample(seed).caption).input_ids
