"""What makes a launch short: weights that are read while Python imports its packages, kernels kept from runs before.

It is used before anything else is imported, so it imports as little as it can itself.
"""

import contextlib
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cogtune.launch import read_launch
from cogtune.variants import VARIANTS

CACHE_VARIABLE = "COGTUNE_CACHE"
"""Environment variable: the folder to keep compiled kernels in, else `cogtune` in the user's own cache folder."""
_NUM_READERS = 4
_PIECE_BYTES = 16 << 20
_MOST_OF_FREE_MEMORY = 0.6


def read_weights_ahead(
    parts: Sequence[str], *, option: str = "--model.path", arguments: Sequence[str] | None = None
) -> list[threading.Thread]:
    """Begins to read the safetensors in these folders of the command's model, so that the system has them in memory
    when they are loaded; what is there already costs little. Returns the threads, which the process doesn't wait for.

    `option` is the one that names the model; a `--config` is read too. A command that is wrong, help, a plan alone, a
    model that isn't on the disk or would fill the memory: nothing is read, and nothing is said.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(flag in given for flag in ("-h", "--help", "--dry-run")):
        return []
    pieces: list[tuple[Path, int]] = []
    with contextlib.suppress(Exception):  # a guess; who reads the arguments in earnest says what is wrong with them
        if read_launch().local_rank:  # one process of a node reads
            return []
        folder = _find_model(given, option)
        files = [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]
        if sum(path.stat().st_size for path in files) > _MOST_OF_FREE_MEMORY * _available_bytes():
            return []
        pieces = [(path, start) for path in files for start in range(0, path.stat().st_size, _PIECE_BYTES)]
    threads = [
        threading.Thread(target=_read, args=(pieces,), daemon=True) for _ in range(_NUM_READERS if pieces else 0)
    ]
    pieces.reverse()  # taken from the end
    for thread in threads:
        thread.start()
    return threads


def _read(pieces: list[tuple[Path, int]]) -> None:
    buffer = bytearray(_PIECE_BYTES)
    with contextlib.suppress(OSError, IndexError):  # none left
        while True:
            path, start = pieces.pop()
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                file.readinto(buffer)


def _find_model(arguments: list[str], option: str) -> Path:
    """The folder of the model that the arguments name, where it is on this disk; raises whatever is wrong."""
    import yaml  # late, as below: who only wants kernels kept needs neither

    name, config = _value_of(arguments, option), _value_of(arguments, "--config")
    if name is None and config is not None:
        name = yaml.safe_load(Path(config).read_text(encoding="utf-8"))["model"]["path"]
    if name is None:
        raise ValueError("no model is named")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    row = VARIANTS.get(str(path))
    found = try_to_load_from_cache((row.hub_name if row else None) or str(path), "model_index.json")
    return Path(str(found)).parent


def _value_of(arguments: list[str], option: str) -> str | None:
    """`option VALUE` or `option=VALUE`, the last of several."""
    found = None
    for number, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
        elif argument == option and number + 1 < len(arguments):
            found = arguments[number + 1]
    return found


def _available_bytes() -> int:
    """Memory that could hold the files: what Linux calls available; 0 elsewhere."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def keep_kernels() -> Path | None:
    """Lets the compiler (Inductor, with Triton's kernels) and FlashAttention-4 keep what they compile in one folder.

    It outlives a restart. Returns it; None where it can't be written, or where all places are set already.
    Places that the environment names stay. Call it before anything is compiled or FlashAttention-4 is imported.
    """
    own = os.environ.get(CACHE_VARIABLE)
    root = (
        Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cogtune"
    )
    # A home that several machines share: code for one kind of processor may not run on another.
    folder = root / "kernels" / _processor()
    wanted = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder / "flash_attention"),
    }
    missing = {name: place for name, place in wanted.items() if name not in os.environ}
    if not missing:
        return None
    try:
        for place in missing.values():
            Path(place).mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return None
    os.environ.update(missing)
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    return folder


def _processor() -> str:
    """Machine and a digest of what its processor can do (Linux)."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
