"""Where a process finds itself: under torchrun, under srun, alone."""

from pathlib import Path

import pytest

from cogtune.cluster.place import find_place
from cogtune.errors import UserError


def test_alone() -> None:
    place = find_place({})
    assert (place.rank, place.world_size) == (0, 1)


def test_under_torchrun() -> None:
    place = find_place(
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "5",
         "TORCHELASTIC_USE_AGENT_STORE": "True"}
    )  # fmt: skip
    assert (place.rank, place.local_rank, place.group, place.hosts_store) == (9, 1, 1, False)


def test_under_srun_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'n7\\nn8\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
             "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_ID": "1234567"}  # fmt: skip
    place = find_place(slurm)
    assert (place.rank, place.world_size, place.group, place.address) == (3, 4, 1, "n7")
    assert 1024 < place.port < 32768 and place.port == find_place(slurm | {"SLURM_PROCID": "0"}).port


def test_half_a_launcher_is_refused() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
