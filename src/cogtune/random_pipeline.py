"""Pipeline folders of the released architectures with random weights: everything runs and times with no download.

python scripts/random_pipeline.py --model cogvideox-5b OUT
"""

import json
import pydoc_data.topics
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ModelMixin,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cogtune.errors import UserError
from cogtune.models import ModelFacts, make_facts

_TRANSFORMER = {
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "attention_head_dim": 64,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "max_text_seq_length": 226,
}
_TINY = _TRANSFORMER | {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 17,
    "max_text_seq_length": 32,
}
_TINY_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_height": 64,
    "sample_width": 96,
}
_ROTARY = {"use_rotary_positional_embeddings": True}
_5B = _TRANSFORMER | _ROTARY | {"num_layers": 42, "num_attention_heads": 48}
_LEARNED = {"in_channels": 32, "use_learned_positional_embeddings": True}
_VERSION_1_5 = {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 96,
    "sample_width": 170,
    "sample_frames": 81,
    "max_text_seq_length": 224,
}
_OFS = {"in_channels": 32, "ofs_embed_dim": 512}
_TINY_1_5 = {"patch_size_t": 2, "patch_bias": False, "max_text_seq_length": 24}

# transformer config, VAE config, SNR shift
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "cogvideox-2b": (_TRANSFORMER | {"num_layers": 30, "num_attention_heads": 30}, {"scaling_factor": 1.15258426}, 3.0),
    "cogvideox-5b": (_5B, {"scaling_factor": 0.7}, 1.0),
    "cogvideox-5b-i2v": (_5B | _LEARNED, {"scaling_factor": 0.7}, 1.0),
    "cogvideox-1.5-5b": (_5B | _VERSION_1_5, {"scaling_factor": 0.7}, 1.0),
    "cogvideox-1.5-5b-i2v": (_5B | _VERSION_1_5 | _OFS, {"scaling_factor": 0.7, "invert_scale_latents": True}, 1.0),
    "tiny": (_TINY | _ROTARY, _TINY_VAE | {"scaling_factor": 0.7}, 1.0),
    "tiny-2b": (_TINY, _TINY_VAE | {"scaling_factor": 1.15258426}, 3.0),
    "tiny-i2v": (_TINY | _ROTARY | _LEARNED, _TINY_VAE | {"scaling_factor": 0.7}, 1.0),
    "tiny-1.5": (_TINY | _ROTARY | _TINY_1_5, _TINY_VAE | {"scaling_factor": 0.7}, 1.0),
    "tiny-1.5-i2v": (
        _TINY | _ROTARY | _TINY_1_5 | {"in_channels": 32, "ofs_embed_dim": 32},
        _TINY_VAE | {"scaling_factor": 0.7, "invert_scale_latents": True},
        1.0,
    ),
}


def write_random_pipeline(
    folder: Path,
    model: str,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    text_encoder: Literal["small", "full"] = "small",
) -> None:
    """Writes a pipeline folder that stock diffusers loads; weights are made on `device`, which is fast on a GPU.

    The text encoder has the right width but one small layer, unless `text_encoder` is "full" (T5-XXL's size).
    """
    if model not in ARCHITECTURES:
        raise UserError(f"--model {model}: known are {', '.join(ARCHITECTURES)}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty; choose another folder")
    transformer_config, vae_config, snr_shift = ARCHITECTURES[model]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(vocabulary=512 if model.startswith("tiny") else 4096)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device or torch.device("cpu"):
            transformer = CogVideoXTransformer3DModel(**transformer_config)
            vae = AutoencoderKLCogVideoX(**vae_config)
            encoder = T5EncoderModel(
                make_text_config(transformer_config["text_embed_dim"], len(tokenizer), text_encoder)
            )
    finally:
        torch.set_default_dtype(default)
    _make_lively(transformer)
    scheduler = _make_scheduler(snr_shift)
    takes_image = transformer_config["in_channels"] == 2 * vae_config.get("latent_channels", 16)
    pipeline = (CogVideoXImageToVideoPipeline if takes_image else CogVideoXPipeline)(
        tokenizer=tokenizer,
        text_encoder=encoder.to(dtype),  # pyright: ignore[reportArgumentType]
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def make_random_transformer(
    model: str, *, seed: int, device: torch.device, dtype: torch.dtype, **changes: Any
) -> CogVideoXTransformer3DModel:
    """A frozen transformer of a released size, made on the device; `changes` to its config, such as `num_layers=2`."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = CogVideoXTransformer3DModel(**ARCHITECTURES[model][0] | changes)
    finally:
        torch.set_default_dtype(default)
    _make_lively(transformer)
    return transformer.requires_grad_(False).eval()


def make_random_on_host(
    build: Callable[[], torch.nn.Module], blocks_name: str, *, device: torch.device, dtype: torch.dtype
) -> Any:
    """A frozen model with small random weights on the host, made part by part on the device, which is fast on a GPU.

    No more than one of its blocks, or all that is outside of them, is on the device at once.
    """
    with torch.device("meta"):
        model = build().to(dtype)
    parts = [*model.get_submodule(blocks_name).children(), model]  # blocks are there already in the last one's turn
    generator = torch.Generator(device).manual_seed(0)
    for part in parts:
        for module in part.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_meta:
                    continue
                values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                values = values.normal_(std=0.02, generator=generator) if tensor.is_floating_point() else values.zero_()
                values = values + 1 if "norm" in type(module).__name__.lower() and name == "weight" else values
                is_parameter = name in module._parameters
                new = torch.nn.Parameter(values.cpu(), requires_grad=False) if is_parameter else values.cpu()
                setattr(module, name, new)
    return model.requires_grad_(False).eval()


def make_architecture_facts(model: str, **changes: Any) -> ModelFacts:
    """What a run must know of a released size, without a folder."""
    transformer, vae, snr_shift = ARCHITECTURES[model]
    with torch.device("meta"):
        transformer_config = dict(CogVideoXTransformer3DModel(**transformer | changes).config)
        vae_config = dict(AutoencoderKLCogVideoX(**vae).config)
    return make_facts(Path(model), transformer_config, vae_config, dict(_make_scheduler(snr_shift).config))


def _make_scheduler(snr_shift: float) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift,
    )


def _make_lively(transformer: ModelMixin) -> None:
    """Default initialisation leaves every modulation near zero; a little noise makes the tests' comparisons strict."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("linear.bias"):
                parameter.add_(0.02 * torch.randn_like(parameter))
        for name, table in transformer.named_buffers():
            if name.endswith("pos_embedding") and transformer.config["use_learned_positional_embeddings"]:
                table.add_(0.02 * torch.randn_like(table))  # a learned table is not the one it started as


def make_text_config(width: int, vocabulary: int, size: Literal["small", "full"]) -> T5Config:
    """A T5 encoder of T5-XXL's size, or one small layer of the right width."""
    if size == "full":
        return T5Config(
            vocab_size=32128,
            d_model=width,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def make_tokenizer(vocabulary: int) -> T5Tokenizer:
    """A T5 tokenizer of English, learned from the Python documentation that every interpreter carries."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list(string.printable.strip()),
    )
    learner.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    pieces = json.loads(learner.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=0)
