"""The model card that lies beside every adapter: what it is, how it was trained, how to use it."""

from cogtune.config import RunConfig
from cogtune.manifest import ClipFormat
from cogtune.models import ModelFacts
from cogtune.variants import VARIANTS

_ADAPTER_CARD = """---
base_model: {base}
library_name: diffusers
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
base_model: {base}
library_name: diffusers
license: other
pipeline_tag: {task}
tags: [cogvideox, {task}, cogtune]
---

# {title}

{base}, all of its transformer fine-tuned with cogtune on {num_clips} clip(s): {steps} steps of {batch} sample(s),
learning rate {learning_rate:g} ({schedule}).{average}

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


def make_model_card(config: RunConfig, facts: ModelFacts, *, num_clips: int, global_batch: int) -> str:
    """README.md of a fully fine-tuned pipeline folder."""
    row, decay = VARIANTS.get(facts.variant), config.train.ema_decay
    return _MODEL_CARD.format(
        base=row.hub_name if row and row.hub_name else config.model.path,
        title=config.output_dir.name,
        num_clips=num_clips,
        steps=config.train.max_steps,
        batch=global_batch,
        learning_rate=config.optimizer.learning_rate,
        schedule=config.schedule.name,
        **_name_task(facts),
        average=f" The weights are an average with decay {decay:g}." if decay else "",
    )


def _name_task(facts: ModelFacts) -> dict[str, str]:
    if facts.takes_image:
        return {"task": "image-to-video", "pipeline": "CogVideoXImageToVideoPipeline"}
    return {"task": "text-to-video", "pipeline": "CogVideoXPipeline"}


def make_adapter_card(
    config: RunConfig, facts: ModelFacts, clip_format: ClipFormat, *, num_clips: int, global_batch: int, dtype: str
) -> str:
    """README.md of an adapter folder."""
    adapter, token = config.adapter, config.data.id_token
    row = VARIANTS.get(facts.variant)
    names = [name for name, wanted in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if wanted]
    return _ADAPTER_CARD.format(
        base=row.hub_name if row and row.hub_name else config.model.path,
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
        dtype=f"{dtype} (its products in float8)" if config.train.float8_base else dtype,
        use_dtype=dtype,
        **_name_task(facts),
        loading="from diffusers.utils import load_image\n" if facts.takes_image else "",
        image='image=load_image("..."), ' if facts.takes_image else "",
        trigger=f"\nPut `{token}` into the prompt: it stood before every training caption.\n" if token else "",
        example=f"{token} ..." if token else "...",
    )
