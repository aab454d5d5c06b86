"""Puts the embedded model's pipeline together: a trained autoencoder, a tokenizer, a text encoder with fixed random
weights, the scheduler, and a transformer with random weights for `train/sft.py` to train.

    python scripts/embedded/build_pipeline.py --vae runs/vae/vae --out runs/tiny-untrained

With --weights it takes the float32 averages of a training's checkpoint instead of random weights, and so makes the
folder that ships in the package, in float16. Everything else but the autoencoder is a function of --seed. The folder
loads with `CogVideoXPipeline.from_pretrained`.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cogtune.errors import UserError, run_command
from cogtune.shapes.captions import vocabulary_captions
from cogtune.shapes.world import HEIGHT, NUM_FRAMES, WIDTH
from cogtune.shards.stored import StoredTensors

TEXT_WIDTH = 64
TEXT_TOKENS = 32  # the longest caption of the world takes 17; a trigger word takes one token a letter and one more
LATENT_CHANNELS = 16
LOG_VARIANCE = -14.0
MEANS_DEVIATION = 0.966  # of the shipped autoencoder's means over 100 clips of the world


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder of a trained autoencoder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wide-posterior", action="store_true", help="leave the autoencoder's variance as trained")
    parser.add_argument("--weights", type=Path, help="folder of a checkpoint with averages (default: random weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=48, help="a multiple of 16, for the 3D rotary split 1:1.5:1.5")
    parser.add_argument("--time-embed-dim", type=int, default=48)
    parser.add_argument("--patch-size", type=int, default=2)
    return parser.parse_args()


def make_tokenizer() -> T5Tokenizer:
    """One token for each word of the world; any other word falls to letters.

    The letters are those of the Latin, Greek and Cyrillic scripts. What is none of them is `<unk>`, as in T5.
    """
    words = sorted({word for text in vocabulary_captions() for word in re.findall(r"[a-z]+", text)})
    letters = [
        chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x180), *range(0x386, 0x3CF), *range(0x400, 0x460))
    ]
    # The segmentation with the highest sum wins: a known word as one token, anything else letter by letter.
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [("▁" + word, -1.0) for word in words] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_TOKENS)


def make_text_encoder(num_tokens: int) -> T5EncoderModel:
    """A T5 encoder with random weights: far-apart words, coloured by their neighbours through one attention layer.

    What a word means is learned by the transformer that reads it. That no text encoder was trained makes the world's
    words and any trigger word equals.
    """
    config = T5Config(
        vocab_size=num_tokens,
        d_model=TEXT_WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def narrow_posterior(vae: AutoencoderKLCogVideoX) -> None:
    """Lets the encoder say its mean with hardly any variance, and scales the latents to a deviation of 1 again.

    The posterior's noise (0.38 beside the means' 0.97) smoothed the latents while the autoencoder was trained. To a
    diffusion model it would be three quarters of its loss, and a sample decodes 8 dB worse than the mean.
    """
    convolution = vae.encoder.conv_out.conv
    with torch.no_grad():
        convolution.weight[LATENT_CHANNELS:] = 0.0
        assert convolution.bias is not None
        convolution.bias[LATENT_CHANNELS:] = LOG_VARIANCE
    vae.register_to_config(scaling_factor=1.0 / MEANS_DEVIATION)


def make_transformer(arguments: argparse.Namespace) -> CogVideoXTransformer3DModel:
    """The transformer with random weights; each block starts as the identity and the output at zero."""
    if arguments.head_dim % 16:
        raise UserError(f"--head-dim {arguments.head_dim}: the rotary split needs a multiple of 16, such as 48 or 64")
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=arguments.time_embed_dim,
        text_embed_dim=TEXT_WIDTH,
        num_layers=arguments.layers,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=NUM_FRAMES,
        patch_size=arguments.patch_size,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )
    for name, module in transformer.named_modules():
        # The modulation's gates at zero make the block the identity: deep stacks train faster from there (DiT).
        if isinstance(module, nn.Linear) and (name == "proj_out" or re.search(r"norm[12]\.linear$", name)):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return transformer


def make_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-5B's schedule. Its SNR shift of 1 stays: a larger one is for larger frames, and these are small."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def make_readable_by_transformers_4(folder: Path) -> None:
    """Rewrites two entries of what transformers 5 saved.

    In transformers 4 `T5Tokenizer` asks for sentencepiece's own file, while the fast class has one name in both; and an
    empty list of extra tokens stops it.
    """
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    config.pop("extra_special_tokens", None)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Builds the parts in order and writes the folder."""
    arguments = parse_arguments()
    if not (arguments.vae / "config.json").is_file():
        raise UserError(f"--vae {arguments.vae}: no config.json there; name the folder `vae` of train_vae.py's --out")
    vae = AutoencoderKLCogVideoX.from_pretrained(arguments.vae)
    if not arguments.wide_posterior:
        narrow_posterior(vae)
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer))
    transformer = make_transformer(arguments)
    if arguments.weights:
        averages = StoredTensors(arguments.weights).group("ema")
        if not averages.specs:
            raise UserError(f"--weights {arguments.weights}: no averages there; name a checkpoint of a run with them")
        transformer.load_state_dict({name: averages.read(name) for name in averages.specs})
    pipeline = CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, make_scheduler())
    # diffusers loads float16 files as float32 unless told otherwise; transformers would keep float16, and the text
    # would then not fit the transformer's weights.
    pipeline.vae.half()
    pipeline.transformer.half()
    pipeline.save_pretrained(arguments.out)
    make_readable_by_transformers_4(arguments.out)
    for file in sorted(arguments.out.rglob("*.safetensors")):
        print(f"{file.relative_to(arguments.out)}: {file.stat().st_size / 1e6:.2f} MB")
    total = sum(file.stat().st_size for file in arguments.out.rglob("*.safetensors"))
    print(f"{arguments.out}: {total / 1e6:.2f} MB of weights, {len(tokenizer)} tokens")


if __name__ == "__main__":
    run_command(main)
