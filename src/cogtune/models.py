"""What a pipeline folder says of itself, and its components.

A table (`cogtune.variants`) holds what no file says (hub name, precision, native length, size and frame rate, which
other sizes are supported). Everything else (layers, scaling factor, SNR shift, kind of positions, token length) is read
from the folder's own configs, so any CogVideoX-shaped pipeline folder works, also one of other sizes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

from cogtune.errors import UserError
from cogtune.frame_convolution import use_frame_convolutions
from cogtune.launch import read_launch
from cogtune.variants import DTYPE_NAMES, VARIANTS, SizeRule

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
EMBEDDED = Path(__file__).parent / "embedded"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
Scheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler


@dataclass(frozen=True)
class ModelFacts:
    """What a run must know of its pipeline folder; lengths in frames or tokens, sizes in pixels."""

    folder: Path
    variant: str
    """Row of `VARIANTS`, or "custom" for a folder with other sizes."""
    dtype: torch.dtype
    num_frames: int
    height: int
    width: int
    fps: float
    fixed_size: bool
    num_layers: int
    num_heads: int
    head_dim: int
    in_channels: int
    latent_channels: int
    patch_size: int
    patch_size_t: int | None
    spatial_factor: int
    temporal_factor: int
    scaling_factor: float
    use_rotary: bool
    learned_positions: bool
    """Its positions are a learned table of one length and size."""
    takes_image: bool
    """Image-to-video: half of the transformer's input channels are the latents of a first frame."""
    takes_ofs: bool
    """It has an embedding of the frame offset (1.5, image-to-video)."""
    image_latent_scale: float
    """What an image's latents are multiplied by; for 1.5 that is 1 / scaling_factor, as diffusers samples."""
    size_rule: SizeRule | None
    max_text_length: int
    text_dim: int
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any]
    scheduler_config: dict[str, Any]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape [F, C, H, W] of a clip's latents; the first frame is encoded alone."""
        frames = (num_frames - 1) // self.temporal_factor + 1
        return frames, self.latent_channels, height // self.spatial_factor, width // self.spatial_factor

    def num_padding(self, num_latent_frames: int) -> int:
        """Latent frames to put before the first one, so that all divide into patches of `patch_size_t`."""
        return -num_latent_frames % (self.patch_size_t or 1)

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Length of the transformer's sequence for one sample: text and video tokens."""
        frames, _, rows, columns = self.latent_shape(num_frames, height, width)
        frames = (frames + self.num_padding(frames)) // (self.patch_size_t or 1)
        return self.max_text_length + frames * (rows // self.patch_size) * (columns // self.patch_size)


def find_folder(name_or_path: str) -> Path:
    """The local pipeline folder for a short name, a folder or a hub name (`model.path`).

    Hub names are looked up in the hub's cache and downloaded by `huggingface_hub` where they are missing: configs and
    safetensors only. Nothing else in this package touches the network. Raises `UserError` where nothing is found.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    row = VARIANTS.get(name_or_path)
    if row is not None and row.hub_name is None:
        embedded = EMBEDDED / name_or_path
        if not embedded.is_dir():
            raise UserError(
                f"model.path={name_or_path}: {embedded} is missing, which belongs to the package; install it again, or "
                "make the model with scripts/embedded/train_base.sh"
            )
        return embedded
    hub_name = row.hub_name if row is not None else name_or_path
    if hub_name is None or hub_name.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise UserError(
            f"model.path={name_or_path}: no such folder; give a pipeline folder, a hub name (owner/name) "
            f"or one of {', '.join(VARIANTS)}"
        )
    return _download(hub_name)


def _download(hub_name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        local = Path(snapshot_download(hub_name, allow_patterns=patterns, local_files_only=True))
        _check_components(local)  # an interrupted download leaves a part, which counts as found
        return local
    except (LocalEntryNotFoundError, UserError):
        pass
    try:
        return Path(snapshot_download(hub_name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model.path={hub_name}: not in the hub's cache, and the download failed "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error


def read_facts(folder: Path) -> ModelFacts:
    """Reads and checks a pipeline folder's configs without loading a weight; raises `UserError`."""
    _check_components(folder)
    transformer = _read_json(folder / "transformer" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    text_encoder = _read_json(folder / "text_encoder" / "config.json")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    for name in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels"):
        if name not in transformer:
            raise UserError(f"{folder}/transformer/config.json: no '{name}'; is this a CogVideoX transformer?")
    text_dim = transformer.get("text_embed_dim", 4096)
    if text_encoder.get("d_model") != text_dim:
        raise UserError(
            f"{folder}: the text encoder is {text_encoder.get('d_model')} wide, the transformer expects {text_dim}; "
            "the components come from different models"
        )
    facts = make_facts(folder, transformer, vae, scheduler)
    if facts.in_channels != facts.latent_channels and not facts.takes_image:
        raise UserError(
            f"{folder}: the transformer takes {facts.in_channels} channels, the VAE makes {facts.latent_channels}; "
            "only text-to-video models (as many) and image-to-video models (twice as many) are supported"
        )
    return facts


def make_facts(folder: Path, transformer: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> ModelFacts:
    """The facts of a pipeline whose components have these configs."""
    name = find_variant(transformer)
    row = VARIANTS.get(name)
    rotary = bool(transformer.get("use_rotary_positional_embeddings", False))
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    patch_size_t = transformer.get("patch_size_t")
    latent_channels = vae.get("latent_channels", 16)
    scaling_factor = float(vae.get("scaling_factor", 1.15258426))
    return ModelFacts(
        folder=folder,
        variant=name,
        dtype=getattr(torch, row.dtype) if row else (torch.bfloat16 if rotary else torch.float16),
        num_frames=row.num_frames if row else transformer.get("sample_frames", 49),
        height=row.height if row else transformer.get("sample_height", 60) * spatial,
        width=row.width if row else transformer.get("sample_width", 90) * spatial,
        fps=row.fps if row else (8.0 if patch_size_t is None else 16.0),
        fixed_size=row.fixed_size if row else False,
        num_layers=transformer["num_layers"],
        num_heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        in_channels=transformer["in_channels"],
        latent_channels=latent_channels,
        patch_size=transformer.get("patch_size", 2),
        patch_size_t=patch_size_t,
        spatial_factor=spatial,
        temporal_factor=int(vae.get("temporal_compression_ratio", 4)),
        scaling_factor=scaling_factor,
        use_rotary=rotary,
        learned_positions=bool(transformer.get("use_learned_positional_embeddings", False)),
        takes_image=transformer["in_channels"] == 2 * latent_channels,
        takes_ofs=transformer.get("ofs_embed_dim") is not None,
        image_latent_scale=1.0 / scaling_factor if vae.get("invert_scale_latents") else scaling_factor,
        size_rule=row.size_rule if row else None,
        max_text_length=transformer.get("max_text_seq_length", 226),
        text_dim=transformer.get("text_embed_dim", 4096),
        transformer_config=transformer,
        vae_config=vae,
        scheduler_config=scheduler,
    )


def find_variant(transformer_config: dict[str, Any]) -> str:
    """Name of the row of `VARIANTS` whose signature the transformer's config carries, else "custom"."""
    for name, row in VARIANTS.items():
        if all(transformer_config.get(key) == value for key, value in row.signature.items()):
            return name
    return "custom"


def _check_components(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder}: no model_index.json; model.path must be a diffusers pipeline folder")
    listed = _read_json(index)
    missing = [name for name in COMPONENTS if name not in listed or not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder}: missing component(s) {', '.join(missing)}; a CogVideoX pipeline has all of "
            f"{', '.join(COMPONENTS)}"
        )
    for name in ("text_encoder", "vae", "transformer"):
        if any((folder / name).glob("*.safetensors")):
            _check_weights(folder / name)
            continue
        pickled = sorted(path.name for path in (folder / name).glob("*.bin"))
        if pickled:
            raise UserError(
                f"{folder}/{name}: only pickled weights ({pickled[0]}), which could run code when read; "
                "convert them to safetensors"
            )
        raise UserError(f"{folder}/{name}: no weights (*.safetensors); the download or copy is incomplete")


def _check_weights(folder: Path) -> None:
    """Every shard that the index names is there, and every file is as long as its header says."""
    for index in folder.glob("*.safetensors.index.json"):
        for shard in sorted(set(_read_json(index)["weight_map"].values())):
            if not (folder / shard).is_file():
                raise UserError(f"{folder}: {shard} is missing; the download or copy of the model is incomplete")
    for path in folder.glob("*.safetensors"):
        _read_shapes(path)


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of a safetensors file's tensors by name, from its header; raises `UserError` where it is not whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(length)) if length < 1 << 28 else {}
            header.pop("__metadata__", None)
            end = max(entry["data_offsets"][1] for entry in header.values())
            shapes = {name: entry["shape"] for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            end, shapes = None, {}
    if end is None or 8 + length + end != path.stat().st_size:
        raise UserError(f"{path}: truncated or damaged; download or copy it again")
    return shapes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the download or copy of the model is incomplete") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the download or copy of the model is damaged") from None


def make_meta_transformer(facts: ModelFacts) -> CogVideoXTransformer3DModel:
    """The transformer's layers and shapes without any memory, for counting and checking before weights load."""
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(facts.transformer_config)
    assert isinstance(model, CogVideoXTransformer3DModel)
    return model


_OTHER_VARIANT = (
    "another variant's weights (layers, image-to-video or not, version 1.0 or 1.5); copy all from one model"
)


def check_transformer_weights(facts: ModelFacts, meta: CogVideoXTransformer3DModel) -> None:
    """Compares the files' headers with the config; raises `UserError` for an unknown, misshapen or missing tensor.

    diffusers would go on with a warning: drop it, compute other positions, or leave random numbers.
    """
    expected = {name: list(tensor.shape) for name, tensor in meta.state_dict().items()}
    computed = {name for name, _ in meta.named_buffers()} - set(expected)  # some files have these positions too
    missing = dict.fromkeys(expected)
    for path in sorted((facts.folder / "transformer").glob("*.safetensors")):
        for name, shape in _read_shapes(path).items():
            if name not in expected and name not in computed:
                raise UserError(f"{path}: {name} is not in the model that its config describes: {_OTHER_VARIANT}")
            if expected.get(name, shape) != shape:
                raise UserError(f"{path}: {name} is {shape}, its config says {expected[name]}: {_OTHER_VARIANT}")
            missing.pop(name, None)
    if missing:
        raise UserError(
            f"{facts.folder / 'transformer'}: {len(missing)} of {len(expected)} tensors missing, first "
            f"{next(iter(missing))}: the download is incomplete, or it has {_OTHER_VARIANT}"
        )


def count_image_encoder(facts: ModelFacts) -> int:
    """Parameters of the autoencoder's encoder, which image-to-video training keeps on the device; else 0."""
    if not facts.takes_image:
        return 0
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(facts.vae_config)
    return sum(p.numel() for p in vae.encoder.parameters())  # pyright: ignore[reportAttributeAccessIssue]


def choose_device(wanted: str) -> torch.device:
    """The device for auto, cuda or cpu, of several processes each one's own, which becomes the current one.

    Raises `UserError` where CUDA is asked for and absent, or a process has no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "cuda is asked for, but torch sees no GPU; check the driver and that torch is a CUDA build "
            f"(it is {torch.__version__}), or choose cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place = read_launch().local_rank
    if place is None:
        return torch.device("cuda")
    if place >= torch.cuda.device_count():
        raise UserError(
            f"process {place} of this node has no GPU, there are {torch.cuda.device_count()}; start one for each GPU"
        )
    torch.cuda.set_device(place)  # else all of them would plan on the first GPU, and keep memory there
    return torch.device("cuda", place)


def choose_dtype(wanted: str, facts: ModelFacts, device: torch.device) -> torch.dtype:
    """The precision for a setting; auto: the variant's own on a GPU, float32 on a CPU."""
    if wanted == "auto":
        return facts.dtype if device.type == "cuda" else torch.float32
    if wanted == "float16" and device.type == "cpu":
        raise UserError("float16 needs a GPU; use auto, float32 or bfloat16 on a CPU")
    return DTYPES[wanted]


def load_transformer(facts: ModelFacts, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """The denoiser on the CPU, frozen, in evaluation mode."""
    check_transformer_weights(facts, make_meta_transformer(facts))
    model = CogVideoXTransformer3DModel.from_pretrained(
        facts.folder / "transformer", torch_dtype=dtype, use_safetensors=True
    )
    return model.requires_grad_(False).eval()


def make_empty_transformer(facts: ModelFacts, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    """What `load_transformer` gives, its parameters on the meta device, to be read later (`shards.filling`)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as diffusers does: buffers are computed in it
    try:
        with init_empty_weights():
            model = CogVideoXTransformer3DModel.from_config(facts.transformer_config)
    finally:
        torch.set_default_dtype(before)
    assert isinstance(model, CogVideoXTransformer3DModel)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # what files hold is rounded; computed ones are float64
                setattr(module, name, buffer.to(dtype))
    return model.requires_grad_(False).eval()


def load_vae(facts: ModelFacts, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """The video autoencoder on the CPU, frozen, in evaluation mode."""
    vae = AutoencoderKLCogVideoX.from_pretrained(facts.folder / "vae", torch_dtype=dtype, use_safetensors=True)
    use_frame_convolutions(vae)
    return vae.requires_grad_(False).eval()


def load_text_encoder(facts: ModelFacts, dtype: torch.dtype) -> torch.nn.Module:
    """The T5 encoder on the CPU, frozen, in evaluation mode."""
    from transformers import T5EncoderModel

    encoder = T5EncoderModel.from_pretrained(facts.folder / "text_encoder", dtype=dtype, use_safetensors=True)
    return encoder.requires_grad_(False).eval()


def load_tokenizer(facts: ModelFacts) -> Any:
    """The tokenizer of the class that the pipeline's index names."""
    import transformers

    class_name = _read_json(facts.folder / "model_index.json")["tokenizer"][1]
    return getattr(transformers, class_name).from_pretrained(facts.folder / "tokenizer")


def load_scheduler(facts: ModelFacts) -> Scheduler:
    """The sampler with the checkpoint's own config: the classes' defaults are wrong for every released model."""
    class_name = _read_json(facts.folder / "model_index.json")["scheduler"][1]
    classes = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler}
    if class_name not in classes:
        raise UserError(f"{facts.folder}: scheduler {class_name} is not known; expected {' or '.join(classes)}")
    return classes[class_name].from_pretrained(facts.folder / "scheduler")
