"""Every setting of a run, declared once: name, type, default and what it does.

A config file is YAML with the sections below; any setting can be given on the command line too, as
`--section.key=value`, which wins over the file. Wrong settings are reported all at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, defaults are checked like given values."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelSettings(Section):
    path: str = "tiny"
    """Hub name, local pipeline folder, or short name (tiny, cogvideox-2b, -5b, -5b-i2v, -1.5-5b, -1.5-5b-i2v)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights and activations; auto: the variant's own on a GPU, float32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto: on a GPU where there is one."""


class DataSettings(Section):
    manifest: Path | None = None
    """Folder (videos with .txt captions, metadata.jsonl|csv, prompts.txt + videos.txt) or a .jsonl or .csv file."""
    validation_manifest: Path | None = None
    """Clips for the evaluation loss only; without it, `validation_clips` are held out of `manifest`."""
    validation_clips: Annotated[int, Field(ge=0)] | None = None
    """How many clips to hold out; default: 5 % where there are at least 20 clips, none otherwise."""
    cache_dir: Path = Path("cache")
    """Where encoded clips and captions are kept; safe to share between runs, and to delete."""
    num_frames: Positive | None = None
    """Frames of a training clip, 4k + 1; default: the model's own."""
    height: Positive | None = None
    """Pixels; default: the model's own."""
    width: Positive | None = None
    """Pixels; default: the model's own."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames a second at which clips are sampled by time; default: the model's own."""
    buckets: Annotated[list[str], Field(min_length=1)] | None = None
    """Several formats instead of one, such as `81x768x1360` (frames x height x width): each clip goes to the one whose
    shape is nearest, and of these to the longest that it fills. A batch holds one."""
    bucket_tokens: Positive | None = None
    """Formats by a budget instead of a list: shapes from portrait to landscape, each as long as this many tokens allow,
    and half and a quarter of that for shorter clips. An upper bound: no sample has more tokens, and most have fewer."""
    allow_unsupported_size: bool = False
    """Allow a length or size that the model card doesn't support; expect worse videos."""
    id_token: str | None = None
    """Trigger word put before every training caption; write it into your prompts yourself."""
    bad_clips: Literal["error", "skip"] = "error"
    """What training does with clips that can't be used: stop and list them, or leave them out and list them."""
    allow_outside_root: bool = False
    """Allow manifest entries that lead out of the manifest's folder by `..`, a link or an absolute path."""
    decode_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Time limit for decoding one clip with one decoder; after it the other decoder has a try."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode clips or read the cache; default: up to 4, fewer on a small machine."""


class AdapterSettings(Section):
    rank: Positive = 64
    """Rank of the LoRA matrices."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank)); default: alpha = rank, a scale of 1."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the LoRA matrices."""
    target_modules: Annotated[list[str], Field(min_length=1)] = ["to_q", "to_k", "to_v", "to_out.0"]
    """Linear layers to adapt: names matched at the end, or (where one has any of *+?[](){}|^$\\) regular expressions
    matched against the whole name, such as `transformer_blocks\\.[0-9]\\..*to_q`."""
    use_rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353); slower."""


class OptimizerSettings(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """AdamW in float32, fused on a GPU; or Muon (`muon.py`), for a LoRA on one process or DDP: a step costs more and
    teaches more. Its learning rate is AdamW's or up to three times that; betas: the first is its momentum."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the moment averages."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of a LoRA's up matrices (B) as a multiple of `learning_rate`, which is that of the others (LoRA+,
    arXiv:2402.12354)."""


class ScheduleSettings(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear end at `final_ratio` of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up from zero; default: 100, or a tenth of a run shorter than 1,000 steps."""
    final_ratio: Fraction = 0.0
    """Learning rate at the last step as a part of the peak."""


class TrainSettings(Section):
    max_steps: Positive = 1000
    """Optimizer steps of the whole run."""
    batch_size: Positive = 1
    """Samples per device and forward pass."""
    gradient_accumulation_steps: Positive = 1
    """Forward passes per optimizer step."""
    context_parallel: Positive = 1
    """Processes that share each sample, its tokens spread over them; the others have samples of their own. Changes no
    result but the order of sums (docs/context.md)."""
    context_attention: Literal["auto", "ulysses", "ring"] = "auto"
    """How they attend to each other's tokens. ulysses: each gets some of the heads; ring: keys and values travel; auto:
    ulysses where heads divide, or nearly do."""
    seed: int = 42
    """Everything random in the run follows from it."""
    caption_dropout: Fraction = 0.1
    """Part of the samples that train without caption, as the base models did."""
    image_dropout: Fraction | None = None
    """Part of the samples that train without their image; default: 0.05, as the base models (image-to-video only)."""
    dropped_caption: Literal["zeros", "empty"] = "zeros"
    """What stands for a dropped caption: zero embeddings, as the released models saw, or those of the empty caption,
    which is what guidance samples against."""
    timestep_strata: Positive = 16
    """This many consecutive samples cover the timesteps evenly, one in each part; 1: independent draws."""
    trained_weights: Annotated[list[str], Field(min_length=1)] | None = None
    """Full fine-tuning: train these weights alone and freeze the others in `model.dtype`; null: all. `attention`, `last
    4 blocks`, or the ends of names or regular expressions as in adapter.target_modules (docs/sft.md)."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Average the trained weights with this decay, for validation and the final weights; null: don't."""
    ema_on_host: bool = False
    """Keep and update that average in host memory, beside the next step; the same result up to rounding."""
    prior_target: Literal["auto", "base", "clip"] = "auto"
    """What clips marked `prior` in the manifest are trained towards: what the base model predicts for them, which holds
    its other abilities in place without their noise (LoRA only; one more forward pass for such a clip), or the clips
    themselves; auto: base for LoRA."""
    prior_weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the loss of clips marked `prior`; predictions have no noise, so they bear a large one."""
    prior_penalty: Annotated[float, Field(gt=0)] | None = None
    """Penalty on the mean square of what the adapter changes in predictions for clips marked `prior`, from second-order
    statistics of the base model that are taken at the start (docs/embedded.md); null: none. LoRA on one GPU or DDP."""
    prior_penalty_samples: Positive = 64
    """Samples of prior clips from which those statistics are taken; each costs a forward and a backward pass, once."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Min-SNR loss weights with this gamma (arXiv:2303.09556); null: plain v-prediction loss."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each transformer block; auto: on a GPU."""
    attention: Literal["auto", "default", "cudnn", "flash", "efficient", "flash3", "flash4"] = "auto"
    """Attention kernel; auto: the fastest for the run's shape, measured at the start (flash3 and flash4 where their
    packages are installed); default: PyTorch's choice, which a CPU takes too but for small shapes in 16 bits."""
    float8_base: bool = False
    """Multiply by the blocks' frozen weights in float8, one scale a row, forward and for input gradients: faster, not
    exact. The adapter's own products stay exact. LoRA only; needs a GPU of compute capability 8.9 (Ada, Hopper)."""
    deterministic: bool = False
    """Take only kernels that sum in one order: a run that is stopped and goes on equals the straight one bit for bit on
    a GPU too, as it does on a CPU anyway. Attention takes 2.6 times as long (docs/checkpoints.md)."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """With several processes: where none of them gets on for this long (a step, a clip, a sampling step, a file), the
    job ends with a message that says where each was; null: never. A lost process ends it within seconds anyway."""
    cuda_graph: bool = False
    """Replay each pass as one CUDA graph: faster for models of a few million parameters, no gain for large ones.
    Needs one GPU, no gradient accumulation and no dropout."""


class MemorySettings(Section):
    mode: Literal["auto", "keep_products", "keep_all", "keep_attention", "recompute"] = "auto"
    """What the backward pass finds in memory: the outputs of matrix products and attention, all activations, attention
    outputs only, or block inputs only (least memory, slowest); auto: the fastest that the plan says will fit."""
    resident_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Blocks whose frozen weights stay on the GPU; the others wait in page-locked host memory and are copied to the GPU
    just in time; with `optimizer: 8bit`, where all are trained, they and AdamW's state, which go back when they are
    updated. The same result; auto: as many as fit (docs/memory.md)."""
    offloaded_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Blocks whose kept activations wait in host memory for the backward pass; the same result. auto: as is fastest."""
    lean_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Blocks that keep less than `mode` says, one step down in this order: keep_all, keep_products, keep_attention,
    recompute; the same result. auto: as is fastest."""
    leaving_blocks: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Offloaded blocks whose activations may be on their way when another block begins; more memory, less waiting."""
    quantized_base: Literal["auto", "none", "int8", "nf4"] = "auto"
    """Keep the frozen linear weights of the transformer's blocks in 8 or 4 bits and decode them for each product: less
    memory, and half or a third to copy where blocks are streamed, but another result (docs/memory.md). LoRA only. auto:
    none, unless `allow_quantized_base`."""
    allow_quantized_base: bool = False
    """Let `quantized_base: auto` take int8 or nf4 where nothing exact fits, or where that is clearly faster."""
    optimizer: Literal["auto", "device", "host", "8bit"] = "auto"
    """Where full fine-tuning keeps its float32 weights and AdamW's state. host: in host memory, updated there beside
    the next forward pass; the GPU computes with streamed copies in `model.dtype` (not float16). auto: on the device if
    they fit. 8bit: bfloat16 weights and AdamW's state in 8 bits, on the device, or streamed as far as they don't fit;
    another result (docs/memory.md)."""
    allow_8bit_optimizer: bool = False
    """Let `optimizer: auto` take 8bit where it is the fastest that fits."""
    allow_tf32: bool = True
    """TensorFloat-32 for float32 matrix products on a GPU (no effect on bfloat16 and float16 ones)."""


class ValidationSettings(Section):
    every_steps: Positive | None = None
    """Evaluate and generate at this interval as well as at the end; null: at the end only."""
    prompts: list[str] = []
    """One video each, used exactly as written; on the command line `--validation.prompts=TEXT`, repeated."""
    images: list[Path] | None = None
    """For image-to-video models: the first frame of each prompt's video, as many as there are prompts."""
    seeds: list[int] = [0]
    """Each prompt is generated with each seed."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    num_inference_steps: Positive = 50
    """Sampling steps."""
    guidance_scale: Annotated[float, Field(ge=1.0)] = 6.0
    """Classifier-free guidance; 1: none."""
    base_videos: bool = True
    """Generate the base model's videos too, once, for comparison."""
    enabled: bool = True
    """False: no evaluation loss and no videos."""


class CheckpointSettings(Section):
    every_steps: Positive | None = 500
    """Interval in steps; null: not by steps."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Interval in minutes of training; null: not by time."""
    asynchronous: Literal["auto", "on", "off"] = "auto"
    """Full fine-tuning: write checkpoints beside training, from a copy in host memory; auto: where the plan says that
    there is enough of it (docs/checkpoints.md)."""
    keep_last: Positive = 3
    """Complete checkpoints kept; older ones are deleted after a new one is complete."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint, if any; never: refuse a used output folder; or the path of
    another run's checkpoint, from which a new output folder starts."""


class TrackingSettings(Section):
    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    """A tracker beside metrics.jsonl, which is always written."""
    log_every_steps: Positive = 10
    """Interval of metrics rows; only these steps wait for the GPU."""
    project: str = "cogtune"
    """Project name for wandb."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: write to <output_dir>/wandb, to be synchronised later."""


class RunConfig(BaseSettings):
    """The whole tree. `output_dir` defaults to runs/<name of the config file>."""

    model_config = SettingsConfigDict(
        extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    model: ModelSettings = ModelSettings()
    """The base model."""
    data: DataSettings = DataSettings()
    """Clips and captions."""
    adapter: AdapterSettings = AdapterSettings()
    """The LoRA adapter (train/lora.py only)."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How weights are updated."""
    schedule: ScheduleSettings = ScheduleSettings()
    """How the learning rate changes."""
    train: TrainSettings = TrainSettings()
    """The run itself."""
    memory: MemorySettings = MemorySettings()
    """What is kept on the GPU."""
    validation: ValidationSettings = ValidationSettings()
    """Evaluation loss and sample videos."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When to save, what to keep, where to resume."""
    tracking: TrackingSettings = TrackingSettings()
    """Where numbers go."""
    output_dir: Path = Path("runs/run")
    """Folder of the run."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Settings come from the file and the command line alone, never from environment variables."""
        return (init_settings,)

    @field_validator("validation")
    @classmethod
    def _prompts_say_something(cls, value: ValidationSettings) -> ValidationSettings:
        if any(not prompt.strip() for prompt in value.prompts):
            raise ValueError("validation.prompts has an empty prompt; remove it or write one")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> "RunConfig":
        if self.data.validation_manifest is not None and self.data.validation_clips:
            raise ValueError("data.validation_manifest and data.validation_clips exclude each other; give one")
        if self.train.ema_on_host and self.train.ema_decay is None:
            raise ValueError("train.ema_on_host=true: has no effect without train.ema_decay; set it, or remove this")
        data = self.data
        if data.buckets and data.bucket_tokens:
            raise ValueError("data.buckets and data.bucket_tokens exclude each other; give one")
        sized = [name for name in ("num_frames", "height", "width") if getattr(data, name) is not None]
        if (data.buckets or data.bucket_tokens) and sized:
            raise ValueError(f"data.{sized[0]}: has no effect beside buckets, which have sizes of their own; remove it")
        return self

    def to_plain(self) -> dict[str, Any]:
        """The tree as plain values, as saved in config.yaml."""
        return self.model_dump(mode="json")
