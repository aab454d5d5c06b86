"""Which parts of which step's validation a run has done, so that a run that is started again doesn't repeat them."""

import json
from pathlib import Path

_NAME = "validated.json"


class ValidationNotes:
    """`<output_dir>/validated.json`: by step and part, the digest of what was asked for. The main process writes it."""

    def __init__(self, folder: Path, *, after: int | None) -> None:
        """`after`: the step from which the run goes on; what it did later will be done again. None: it starts anew."""
        self._path, self._after = folder / _NAME, after
        self._steps: dict[str, dict[str, str]] | None = None

    def find(self, step: int) -> dict[str, str]:
        """The digests by part."""
        return dict(self._read().get(str(step), {}))

    def note(self, step: int, part: str, digest: str) -> None:
        """Writes down that a part is done."""
        self._read().setdefault(str(step), {})[part] = digest
        temporary = self._path.with_suffix(".partial")
        temporary.write_text(json.dumps(self._read(), indent=1), encoding="utf-8")
        temporary.replace(self._path)

    def _read(self) -> dict[str, dict[str, str]]:
        if self._steps is None:
            known = {}
            if self._after is not None and self._path.is_file():
                known = json.loads(self._path.read_text(encoding="utf-8"))
            self._steps = {step: parts for step, parts in known.items() if int(step) <= (self._after or 0)}
        return self._steps
