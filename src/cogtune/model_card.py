"""The model card that lies beside every adapter: what it is, how it was trained, how to use it."""

from cogtune.config import RunConfig
from cogtune.models import VARIANTS, ModelFacts

_ADAPTER_CARD = """---
base_model: {base}
library_name: diffusers
license: other
pipeline_tag: text-to-video
tags: [cogvideox, lora, text-to-video, cogtune]
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
from diffusers import CogVideoXPipeline

pipeline = CogVideoXPipeline.from_pretrained("{base}", torch_dtype=torch.{use_dtype}).to("cuda")
pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")  # the file holds rank and alpha: this is the trained strength
video = pipeline("{example}", num_frames={num_frames}, height={height}, width={width}).frames[0]
```
"""


_MODEL_CARD = """---
base_model: {base}
library_name: diffusers
license: other
pipeline_tag: text-to-video
tags: [cogvideox, text-to-video, cogtune]
---

# {title}

{base}, all of its transformer fine-tuned with cogtune on {num_clips} clip(s): {steps} steps of {batch} sample(s),
learning rate {learning_rate:g} ({schedule}).{average}

```python
from diffusers import CogVideoXPipeline

pipeline = CogVideoXPipeline.from_pretrained("PATH_OF_THIS_FOLDER")
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
        average=f" The weights are an average with decay {decay:g}." if decay else "",
    )


def make_adapter_card(config: RunConfig, facts: ModelFacts, *, num_clips: int, global_batch: int, dtype: str) -> str:
    """README.md of an adapter folder."""
    adapter, token = config.adapter, config.data.id_token
    row = VARIANTS.get(facts.variant)
    names = [name for name, wanted in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if wanted]
    return _ADAPTER_CARD.format(
        base=row.hub_name if row and row.hub_name else config.model.path,
        instance_prompt=f'instance_prompt: "{token}"\n' if token else "",
        title=config.output_dir.name,
        num_clips=num_clips,
        num_frames=config.data.num_frames or facts.num_frames,
        width=config.data.width or facts.width,
        height=config.data.height or facts.height,
        fps=config.data.fps or facts.fps,
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
        trigger=f"\nPut `{token}` into the prompt: it stood before every training caption.\n" if token else "",
        example=f"{token} ..." if token else "...",
    )
