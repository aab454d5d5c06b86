"""Copies of the test's process, which several ranks are."""

import gc
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from ranks import start_ranks


def test_a_copy_does_not_collect_a_process_group_that_a_test_left(tmp_path: Path) -> None:
    """The group's threads are not in the copy: to let it go is a crash there."""
    gc.disable()
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        left = SimpleNamespace(group=dist.group.WORLD)
        left.itself = left
        dist.destroy_process_group()
        del left
        ranks = start_ranks(lambda _script: 0 * gc.collect(), tmp_path / "ranks", "", [[]])
        assert ranks.wait(20) == [0], ranks.text()
    finally:
        gc.enable()
