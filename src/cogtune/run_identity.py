"""What makes a run the same run: which settings may change before it goes on, and what an output folder may hold."""

from pathlib import Path

import yaml

from cogtune.checkpoint import find_differences
from cogtune.config import RunConfig
from cogtune.errors import UserError

# Settings that may differ between a run and its continuation: they change no training result.
_FREE_SETTINGS = frozenset(
    {
        "validation",
        "checkpoint",
        "tracking",
        "output_dir",
        "memory",
        "model.device",
        "train.compile",
        "train.attention",
        "train.deterministic",
        "train.context_attention",
        "train.context_parallel",
        "train.ema_on_host",
        "train.batch_size",
        "train.timeout_minutes",
        "train.gradient_accumulation_steps",  # their product with the processes is compared instead
        "data.manifest",
        "data.validation_manifest",
        "data.validation_clips",  # the clips are compared instead
        "data.cache_dir",
        "data.num_workers",
        "data.decode_timeout_seconds",
        "data.bad_clips",
        "data.allow_outside_root",
    }
)


def check_output_folder(config: RunConfig) -> None:
    """Raises `UserError` for an output folder that holds something else than this run; reads no large file."""
    folder, resume = config.output_dir, config.checkpoint.resume
    saved_config = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder}: is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not saved_config.is_file():
        raise UserError(f"output_dir={folder}: holds files that are no run's; choose another folder")
    if resume == "never" and saved_config.is_file():
        raise UserError(
            f"output_dir={folder}: holds a run and checkpoint.resume is 'never'; "
            "choose another folder, delete this one, or set checkpoint.resume=auto"
        )
    has_checkpoints = any((folder / "checkpoints").glob("step-*/manifest.json"))
    if saved_config.is_file() and has_checkpoints and resume == "auto":
        saved = yaml.safe_load(saved_config.read_text(encoding="utf-8"))
        refuse_differences(folder, find_differences(saved, config.to_plain(), free_settings(config)))


def free_settings(config: RunConfig) -> frozenset[str]:
    """Settings that may differ between this run and its continuation."""
    # With a decaying schedule the number of steps shapes every step's learning rate.
    return _FREE_SETTINGS | ({"train.max_steps"} if config.schedule.name == "constant" else set())


def refuse_differences(folder: Path, differences: list[str]) -> None:
    """Raises `UserError` naming what differs, where anything does."""
    if differences:
        listed = "\n       ".join(differences)
        raise UserError(
            f"output_dir={folder}: holds another run; resuming it with these changes would be wrong:\n"
            f"       {listed}\n       choose another output_dir, or undo them"
        )
