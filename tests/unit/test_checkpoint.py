"""Checkpoints: complete or not there at all, rotated, checked by digest."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtune.checkpoint import MANIFEST, CheckpointFolder, find_differences, read_checkpoint
from cogtune.errors import UserError


def write_weights(seed: int, size: int = 1000) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        save_file({"weight": tensor}, folder / "weights.safetensors")
        (folder / "sub").mkdir()
        (folder / "sub" / "card.md").write_text(f"card {seed}")

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep_last=2)


def collect(folder: CheckpointFolder) -> tuple[int | None, list[str]]:
    reports: list[str] = []
    found = folder.find_newest(reports.append)
    return (found.step if found else None), reports


def test_what_is_saved_is_found(folder: CheckpointFolder) -> None:
    state = {"guard": {"scale": 2.0}, "config": {"train": {"seed": 1}}}
    path = folder.save(7, state, write_weights(1))
    assert path.name == "step-000007"
    found = folder.find_newest(pytest.fail)
    assert found is not None and (found.folder, found.step, found.state) == (path, 7, state)
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["sub/card.md", "weights.safetensors"], "every file but the manifest itself"


def test_nothing_is_found_where_nothing_is(folder: CheckpointFolder) -> None:
    assert collect(folder) == (None, [])


def test_only_the_newest_are_kept(folder: CheckpointFolder) -> None:
    for step in (5, 10, 15, 1_000_000, 999_999):
        folder.save(step, {}, write_weights(step))
    assert names(folder.folder) == ["step-1000000", "step-999999"]
    assert collect(folder)[0] == 1_000_000, "ordered by number, not by name"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, expected",
    [
        (lambda path: damage(path / "weights.safetensors"), "weights.safetensors is damaged"),
        (lambda path: damage(path / "sub" / "card.md"), "sub/card.md is damaged"),
        (lambda path: (path / "sub" / "card.md").unlink(), "sub/card.md is missing"),
        (lambda path: (path / MANIFEST).write_text('{"step": 20, "files": {'), "no complete manifest"),
        (lambda path: (path / MANIFEST).write_text("[]"), "no complete manifest"),
        (lambda path: (path / MANIFEST).write_text('{"step": 20, "files": {}}'), "no complete manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_reported(
    folder: CheckpointFolder, harm: Callable[[Path], None], expected: str
) -> None:
    for step in (10, 20):
        folder.save(step, {}, write_weights(step))
    harm(folder.folder / "step-000020")
    step, reports = collect(folder)
    assert step == 10
    assert len(reports) == 1 and expected in reports[0] and "step-000020" in reports[0] and "falling back" in reports[0]
    with pytest.raises(UserError, match=expected):
        read_checkpoint(folder.folder / "step-000020")


def test_with_every_checkpoint_damaged_none_is_found(folder: CheckpointFolder) -> None:
    for step in (10, 20):
        damage(folder.save(step, {}, write_weights(step)) / "weights.safetensors")
    step, reports = collect(folder)
    assert step is None and len(reports) == 2


def test_a_folder_without_manifest_is_never_resumed_from_nor_counted(folder: CheckpointFolder) -> None:
    for step in (10, 20):
        folder.save(step, {}, write_weights(step))
    for name in ("step-000030", "step-000040"):
        shutil.copytree(folder.folder / "step-000020", folder.folder / name)
        (folder.folder / name / MANIFEST).unlink()
    assert collect(folder) == (20, [])
    folder.save(50, {}, write_weights(50))
    complete = [path.parent.name for path in sorted(folder.folder.glob(f"*/{MANIFEST}"))]
    assert complete == ["step-000020", "step-000050"], "the incomplete ones pushed no complete one out"


def test_an_interrupted_save_leaves_the_older_one_and_no_new_one(folder: CheckpointFolder) -> None:
    """As a kill would: the folder stays behind half-written, under its temporary name."""

    def write_half(partial: Path) -> None:
        (partial / "weights.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    folder.save(10, {}, write_weights(10))
    with pytest.raises(KeyboardInterrupt):
        folder.save(20, {}, write_half)
    assert collect(folder) == (10, [])
    assert len(names(folder.folder)) == 2
    folder.remove_partial()
    assert names(folder.folder) == ["step-000010"]
    folder.save(20, {}, write_weights(20))
    assert collect(folder) == (20, [])


def test_a_leftover_of_a_killed_save_does_not_get_into_the_next(folder: CheckpointFolder) -> None:
    def write_half(partial: Path) -> None:
        (partial / "stray.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save(20, {}, write_half)
    path = folder.save(20, {}, write_weights(20))
    assert not (path / "stray.bin").exists()


def test_saving_a_step_again_replaces_it(folder: CheckpointFolder) -> None:
    folder.save(10, {"run": 1}, write_weights(1))
    folder.save(10, {"run": 2}, write_weights(2))
    found = folder.find_newest(pytest.fail)
    assert found is not None and found.state == {"run": 2} and names(folder.folder) == ["step-000010"]


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """Files can't grow beyond the limit: the system answers a write as it does on a full disk, with an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["weights", "manifest"])
def test_a_full_disk_keeps_the_older_checkpoint_and_leaves_nothing_half_written(
    folder: CheckpointFolder, kind: str
) -> None:
    folder.save(10, {}, write_weights(10))
    folder.save(20, {}, write_weights(20))
    big = kind == "weights"
    state = {} if big else {"long": "x" * 100_000}
    with full_disk(50_000), pytest.raises(UserError) as caught:
        folder.save(30, state, write_weights(30, size=100_000 if big else 10))
    for part in ("checkpoint at step 30", "free some space", "step-000010, step-000020"):
        assert part in str(caught.value)
    assert names(folder.folder) == ["step-000010", "step-000020"]
    assert collect(folder) == (20, [])


def test_a_checkpoint_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="complete checkpoints: none"):
        CheckpointFolder(tmp_path / "file" / "checkpoints", keep_last=1).save(1, {}, write_weights(1))


def test_differences_are_named_by_key() -> None:
    saved = {"train": {"seed": 1, "max_steps": 5}, "adapter": {"rank": 4}, "output_dir": "a", "memory": {"mode": "x"}}
    current = {"train": {"seed": 2, "max_steps": 9}, "adapter": {"rank": 4, "new": 1}, "output_dir": "b", "memory": {}}
    free = frozenset({"output_dir", "memory", "train.max_steps"})
    assert find_differences(saved, current, free) == ["adapter.new: None -> 1", "train.seed: 1 -> 2"]
    assert find_differences(saved, saved, frozenset()) == []
    assert find_differences({"a": 1}, {}, frozenset()) == ["a: 1 -> None"]
    newer = {"train": {"seed": 1, "float8_base": False}}
    assert find_differences({"train": {"seed": 1}}, newer, frozenset()) == [], "off is what the run did"
    newer["train"]["float8_base"] = True
    assert find_differences({"train": {"seed": 1}}, newer, frozenset()) == ["train.float8_base: None -> True"]


def test_the_checkpoint_just_written_is_never_rotated_away(tmp_path: Path) -> None:
    """Also where later ones of another line lie in the folder."""
    store = CheckpointFolder(tmp_path, keep_last=2)
    for step in (500, 1000, 100):
        store.save(step, {}, lambda folder: (folder / "weights").write_bytes(b"x") and None)
    assert (tmp_path / "step-000100" / "manifest.json").is_file()
