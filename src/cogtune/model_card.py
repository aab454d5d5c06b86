"""The model card that lies beside every adapter: what it is, how it was trained, how to use it."""

import re
from pathlib import Path

from cogtune.config import RunConfig
from cogtune.manifest import ClipFormat
from cogtune.models import ModelFacts
from cogtune.variants import VARIANTS

_ADAPTER_CARD = """---
{base_line}library_name: diffusers
license: other
pipeline_tag: {task}
tags: [cogvideox, lora, {task}, cogtune]
{instance_prompt}---

# {title}

A LoRA adapter for {base}, trained with cogtune on {num_clips} clip(s) of {num_frames} frames,
{width}x{height} at {fps:g} fps.

| | |
|---|---|
| rank, alpha | {rank}, {alpha:g}{kind} |
| adapted layers | `{targets}` |
| learning rate | {learning_rate:g}, {schedule} |
| steps, batch | {steps} steps of {batch} sample(s) |
| precision | base {dtype}, adapter float32 |
{trigger}
## Use

```python
import torch
from diffusers import {pipeline}
{loading}
pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.{use_dtype}).to("cuda")
pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")  # the file holds rank and alpha: this is the trained strength
video = pipeline({image}prompt="{example}", num_frames={num_frames}, height={height}, width={width}{length}).frames[0]
```
"""


_MODEL_CARD = """---
{base_line}library_name: diffusers
license: other
pipeline_tag: {task}
tags: [cogvideox, {task}, cogtune]
---

# {title}

{base}, {part} of its transformer fine-tuned with cogtune on {num_clips} clip(s): {steps} steps of {batch} sample(s),
learning rate {learning_rate:g} ({schedule}).{average}{optimizer}

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


_DERIVED_CARD = """---
{base_model}library_name: diffusers
license: other
pipeline_tag: text-to-video
tags: [cogvideox, {tag}text-to-video, cogtune]
---

# {title}

{made}, with cogtune.

```python
from diffusers import DiffusionPipeline

{use}
```
"""


def make_derived_card(title: str, *, base: str | None, made: str, is_adapter: bool) -> str:
    """README.md of an adapter or pipeline that was made from others; `base` as in `model.path`."""
    row = VARIANTS.get(base or "")
    hub_name = row.hub_name if row else base if base and is_hub_name(base) else None
    path = "PATH_OF_THIS_FOLDER"
    load = f'pipeline = DiffusionPipeline.from_pretrained("{hub_name or ("BASE_MODEL" if is_adapter else path)}")'
    if is_adapter:
        load += f'\npipeline.load_lora_weights("{path}")'
    elif hub_name:
        load = f'pipeline = DiffusionPipeline.from_pretrained("{path}")'
    return _DERIVED_CARD.format(
        base_model=f"base_model: {hub_name}\n" if hub_name else "",
        tag="lora, " if is_adapter else "",
        title=title,
        made=made,
        use=load,
    )


def is_hub_name(name: str) -> bool:
    """Whether a `model.path` names a repository of the hub: `owner/name`, and no folder of that name is there."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _base_line(name: str) -> str:
    # The hub refuses a card that names a folder as its base.
    return f"base_model: {name}\n" if is_hub_name(name) else ""


def make_model_card(
    config: RunConfig, facts: ModelFacts, *, num_clips: int, global_batch: int, eight_bit: bool = False
) -> str:
    """README.md of a fully fine-tuned pipeline folder; `eight_bit`: AdamW's state was kept so."""
    row, decay = VARIANTS.get(facts.variant), config.train.ema_decay
    trained = config.train.trained_weights
    base = row.hub_name if row and row.hub_name else config.model.path
    return _MODEL_CARD.format(
        base=base,
        base_line=_base_line(base),
        title=config.output_dir.name,
        num_clips=num_clips,
        steps=config.train.max_steps,
        batch=global_batch,
        learning_rate=config.optimizer.learning_rate,
        schedule=config.schedule.name,
        **_name_task(facts),
        part="all" if trained is None else f"a part ({', '.join(f'`{pattern}`' for pattern in trained)})",
        average=f" The weights are an average with decay {decay:g}." if decay else "",
        optimizer="\nThe weights were bfloat16 while training, AdamW's state 8 bits." if eight_bit else "",
    )


def _name_task(facts: ModelFacts) -> dict[str, str]:
    if facts.takes_image:
        return {"task": "image-to-video", "pipeline": "CogVideoXImageToVideoPipeline"}
    return {"task": "text-to-video", "pipeline": "CogVideoXPipeline"}


def _name_rounding(config: RunConfig, quantized: str | None) -> str:
    if config.train.float8_base:
        return " (its products in float8)"
    return f" (its blocks' linear weights in {quantized})" if quantized else ""


def make_adapter_card(
    config: RunConfig,
    facts: ModelFacts,
    clip_format: ClipFormat,
    *,
    num_clips: int,
    global_batch: int,
    dtype: str,
    quantized: str | None = None,
) -> str:
    """README.md of an adapter folder; `quantized`: how the frozen base was kept in training."""
    adapter, token = config.adapter, config.data.id_token
    row = VARIANTS.get(facts.variant)
    base = row.hub_name if row and row.hub_name else config.model.path
    names = [name for name, wanted in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if wanted]
    return _ADAPTER_CARD.format(
        base=base,
        base_line=_base_line(base),
        instance_prompt=f'instance_prompt: "{token}"\n' if token else "",
        title=config.output_dir.name,
        num_clips=num_clips,
        num_frames=clip_format.num_frames,
        width=clip_format.width,
        height=clip_format.height,
        fps=clip_format.fps,
        length="" if facts.max_text_length == 226 else f", max_sequence_length={facts.max_text_length}",
        rank=adapter.rank,
        alpha=adapter.alpha if adapter.alpha is not None else adapter.rank,
        kind=f" ({', '.join(names)})" if names else "",
        targets=", ".join(adapter.target_modules),
        learning_rate=config.optimizer.learning_rate,
        schedule=config.schedule.name,
        steps=config.train.max_steps,
        batch=global_batch,
        dtype=dtype + _name_rounding(config, quantized),
        use_dtype=dtype,
        **_name_task(facts),
        loading="from diffusers.utils import load_image\n" if facts.takes_image else "",
        image='image=load_image("..."), ' if facts.takes_image else "",
        trigger=f"\nPut `{token}` into the prompt: it stood before every training caption.\n" if token else "",
        example=f"{token} ..." if token else "...",
    )
