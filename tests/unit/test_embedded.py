"""The model that ships in the package: its size, its autoencoder, and that it shows what it is asked for."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from cogtune.encoding import encode_frames
from cogtune.generation import decode_latents
from cogtune.models import find_folder, load_vae, read_facts
from cogtune.shapes.captions import base_prompts
from cogtune.shapes.render import render
from cogtune.shapes.scoring import score_prompts
from cogtune.shapes.world import sample_clip
from patience import takes_minutes


def test_it_is_small_and_found_by_its_name():
    folder = find_folder("tiny")
    facts = read_facts(folder)
    assert (facts.variant, facts.num_frames, facts.height, facts.width, facts.fps) == ("tiny", 17, 64, 96, 8.0)
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 12_000_000


def test_its_autoencoder_keeps_unseen_clips():
    facts = read_facts(find_folder("tiny"))
    vae = load_vae(facts, torch.float32)
    errors = []
    for index in range(12):
        frames = render(sample_clip("held_out", 77, index))
        mean, logvar = encode_frames(vae, torch.from_numpy(frames)[None])
        assert logvar.max() < -10  # a sample of the posterior is its mean
        back = decode_latents(vae, mean.transpose(1, 2) * facts.scaling_factor, facts.scaling_factor)
        errors.append(np.square(back.astype(np.float64) - frames).mean())
    assert 10 * np.log10(255**2 / np.mean(errors)) > 32.0


@takes_minutes
def test_stock_diffusers_draws_what_unseen_prompts_ask_for():
    pipeline = CogVideoXPipeline.from_pretrained(find_folder("tiny"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scores = score_prompts(pipeline, base_prompts(300, seed=0)[::50], seed=3)
    assert scores.num_videos == 6
    assert scores.motion >= 5 and scores.colour >= 5 and scores.right >= 4, scores.describe()


@pytest.mark.parametrize("split", ["held_out", "concept_held_out"])
def test_latents_are_scaled_to_one(split: str):
    facts = read_facts(find_folder("tiny"))
    frames = torch.from_numpy(np.stack([render(sample_clip(split, 5, index)) for index in range(6)]))
    mean, _ = encode_frames(load_vae(facts, torch.float32), frames)
    assert 0.85 < float(mean.std()) * facts.scaling_factor < 1.2
