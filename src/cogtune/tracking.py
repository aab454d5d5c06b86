"""Numbers of a run: `metrics.jsonl` always, a tracker on request, and the live progress bar."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from tqdm import tqdm

from cogtune.errors import UserError


class _Tracker(Protocol):
    def log(self, row: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _WandbTracker:
    def __init__(self, folder: Path, project: str, mode: Literal["online", "offline"], config: dict[str, Any]) -> None:
        try:
            import wandb  # optional here: the import takes seconds
        except ImportError:
            raise UserError("tracking.report_to=wandb: wandb is not installed; pip install wandb") from None
        # Resumed runs continue the same wandb run: its id lies beside the metrics.
        id_file = folder / "wandb-run-id"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project=project, mode=mode, dir=str(folder), config=config, id=run_id, resume="allow", name=folder.name
            )
        except wandb.errors.UsageError as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(
                f"tracking.report_to=wandb: {error}; log in with `wandb login`, or set tracking.wandb_mode=offline"
            ) from None
        id_file.write_text(self._run.id)

    def log(self, row: dict[str, float], step: int) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoardTracker:
    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # needs the optional extra
        except ImportError:
            raise UserError(
                "tracking.report_to=tensorboard: tensorboard is not installed; pip install 'cogtune[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def log(self, row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MetricsLog:
    """Writes rows on the main process; on the others it does nothing. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        first_step: int,
        report_to: Literal["none", "wandb", "tensorboard"],
        project: str,
        wandb_mode: Literal["online", "offline"],
        config: dict[str, Any],
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._active = active
        self._tracker: _Tracker | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        if report_to == "wandb":
            self._tracker = _WandbTracker(folder, project, wandb_mode, config)
        elif report_to == "tensorboard":
            self._tracker = _TensorBoardTracker(folder, first_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._active:
            self._file.close()
            if self._tracker is not None:
                self._tracker.close()

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row; `step` is in it. Nested dictionaries go to a tracker as `name/key`."""
        if not self._active:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tracker is not None:
            flat: dict[str, float] = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            for name, nested in row.items():
                if isinstance(nested, dict):
                    flat |= {f"{name}/{key}": value for key, value in nested.items()}
            self._tracker.log(flat, row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line cut off by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    """A killed run may have logged steps that the resumed one makes again."""
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= step]
    if path.exists() and (len(kept) < len(rows) or not path.read_text(encoding="utf-8").endswith("\n")):
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)


class Progress:
    """The live bar: step, loss, seconds a step, time left, memory."""

    def __init__(self, *, first_step: int, max_steps: int, active: bool) -> None:
        self._bar = tqdm(total=max_steps, initial=first_step, unit="step", desc="training", disable=not active)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self) -> None:
        """One step more."""
        self._bar.update()

    def show(self, row: dict[str, Any]) -> None:
        """Puts a metrics row's figures beside the bar."""
        figures = {"loss": f"{row['loss']:.4f}", "s/step": f"{row['step_seconds']:.2f}"}
        if row.get("peak_memory_gib"):
            figures["GiB"] = f"{row['peak_memory_gib']:.1f}"
        self._bar.set_postfix(figures)
