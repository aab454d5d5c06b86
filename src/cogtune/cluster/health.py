"""What one process finds out about its node: versions, GPU, memory, folders, the model's files."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from cogtune.host_threads import available_cores
from cogtune.streaming.host import free_host_bytes

GIB = 1 << 30
PACKAGES = ("cogtune", "accelerate", "diffusers", "transformers", "peft", "deepspeed", "safetensors")
_GPU_FIELDS = (
    "uuid",
    "driver_version",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
)
# nvml.h: hardware slowdown, software thermal, hardware thermal, power brake; a power cap and idling are ordinary.
_THROTTLED = {0x8: "slowed down", 0x20: "hot", 0x40: "too hot", 0x80: "short of power"}
_SMALL_FILE = 1 << 20


def find_versions() -> dict[str, str]:
    """Names and versions of what has to agree over all ranks."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    if torch.version.cuda is not None and torch.cuda.is_available():
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, nccl.version()))}
    return found


def ask_nvidia_smi() -> dict[str, dict[str, Any]]:
    """What the driver says of each GPU of this node, by uuid; nothing where there is no driver."""
    try:
        rows, apps = (
            subprocess.run(
                ["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"],
                capture_output=True, text=True, check=True, timeout=30,
            ).stdout
            for what in (f"gpu={','.join(_GPU_FIELDS)}", "compute-apps=gpu_uuid,used_memory")
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_nvidia_smi(rows, apps)


def read_nvidia_smi(rows: str, apps: str) -> dict[str, dict[str, Any]]:
    """Both tables as dictionaries: driver, temperature, ECC errors, why it is slowed down, other processes."""
    found: dict[str, dict[str, Any]] = {}
    for line in rows.strip().splitlines():
        name, driver, degrees, errors, reasons = (value.strip() for value in line.split(","))
        bits = int(reasons, 16) if reasons.startswith("0x") else 0
        found[name] = {
            "driver": driver,
            "celsius": int(degrees) if degrees.isdigit() else None,
            "ecc_errors": int(errors) if errors.isdigit() else None,
            "slowed": [word for bit, word in _THROTTLED.items() if bits & bit],
            "processes": 0,
        }
    for line in apps.strip().splitlines():
        name = line.split(",")[0].strip()
        if name in found:
            found[name]["processes"] += 1
    return found


def examine_gpu(device: torch.device, driver_says: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Name, memory and state of the rank's GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    state = driver_says.get(f"GPU-{properties.uuid}", {})
    return {"name": properties.name, "free_gib": free / GIB, "total_gib": total / GIB} | state


def measure_matmul(device: torch.device) -> float:
    """TFLOP/s of a large product in bfloat16, or of a small one in float32 on a CPU; the best of some."""
    size, dtype, repeats = (8192, torch.bfloat16, 10) if device.type == "cuda" else (512, torch.float32, 5)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_folder(folder: Path, *, mebibytes: int) -> dict[str, Any]:
    """MB/s of writing (to the disk) and reading (past the page cache, as far as the system lets) one file."""
    path = folder / f".doctor-{uuid.uuid4().hex}"
    block = os.urandom(1 << 20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(mebibytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
        done = time.perf_counter()
        megabytes = mebibytes * 1.048576
        return {
            "write": megabytes / (written - started),
            "read": megabytes / (done - written),
            "free_gib": shutil.disk_usage(folder).free / GIB,
        }
    except OSError as error:
        return {"problem": f"{folder}: {error.strerror}"}
    finally:
        path.unlink(missing_ok=True)


def examine_model(folder: Path) -> dict[str, Any]:
    """Digest of a model's small files and of the sizes of the large ones."""
    digest = hashlib.sha256()
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size};".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SMALL_FILE if size <= _SMALL_FILE else 1))
    except OSError as error:
        return {"problem": f"{error.filename}: {error.strerror}"}
    return {"digest": digest.hexdigest()[:12], "files": len(files)}


def examine_host() -> dict[str, Any]:
    """Free host memory and the shared memory that the loaders' workers use, in GiB."""
    shm = Path("/dev/shm")
    free = free_host_bytes()
    return {
        "memory_gib": None if free is None else free / GIB,
        "shm_gib": shutil.disk_usage(shm).free / GIB if shm.is_dir() else None,
        "cores": available_cores(),
    }
