"""The cache: atomic, checked, content-keyed."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch

from cogtune.cache import Cache, digest_bytes, digest_tensors, make_key
from cogtune.errors import UserError


def draw_entry(seed: int, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean": torch.randn(4, size, generator=generator),
        "logvar": torch.randn(4, size, generator=generator).bfloat16(),
    }


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_same(read: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> None:
    assert read is not None and read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_entries_come_back_exactly(tmp_path: Path) -> None:
    cache, entry = Cache(tmp_path / "cache"), draw_entry(0)
    assert cache.read("latents", "ab12") is None and not cache.has("latents", "ab12")
    cache.write("latents", "ab12", entry | {"mean": entry["mean"].t().contiguous().t()})
    assert cache.has("latents", "ab12") and not cache.has("text", "ab12")
    assert_same(cache.read("latents", "ab12"), entry)
    assert files_in(cache.folder) == [cache.path("latents", "ab12")]
    assert cache.size_bytes() == cache.path("latents", "ab12").stat().st_size


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: flip(path, -1),
        lambda path: flip(path, 0),
        lambda path: flip(path, path.read_bytes().index(b"digest") + 12),
        lambda path: flip(path, path.read_bytes().index(b"F32")),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes()[:5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x00" * 4096),
    ],
    ids=["data", "length", "digest", "header", "truncated", "header only", "empty", "zeros"],
)
def test_a_damaged_entry_is_found_removed_and_can_be_made_again(tmp_path: Path, harm) -> None:
    cache, entry = Cache(tmp_path), draw_entry(1)
    cache.write("latents", "cd", entry)
    harm(cache.path("latents", "cd"))
    assert cache.read("latents", "cd") is None
    assert not cache.has("latents", "cd"), "removed, so that it is made again"
    cache.write("latents", "cd", entry)
    assert_same(cache.read("latents", "cd"), entry)


def test_an_entry_without_digest_is_damaged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cache = Cache(tmp_path)
    path = cache.path("text", "ef")
    path.parent.mkdir(parents=True)
    save_file({"embeddings": torch.ones(2)}, path)
    assert cache.read("text", "ef") is None and not path.exists()


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_a_failed_write_leaves_the_old_entry_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    cache, old = Cache(tmp_path), draw_entry(2)
    cache.write("latents", "ab", old)
    original = getattr(Path, call)

    def fail(self: Path, *arguments: object) -> None:
        if call == "write_bytes":
            original(self, b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(UserError, match=r"data\.cache_dir=.*No space left on device.*free some space"):
            cache.write("latents", "ab", draw_entry(3))
    assert_same(cache.read("latents", "ab"), old)
    assert files_in(tmp_path) == [cache.path("latents", "ab")]


def test_readers_never_see_half_an_entry(tmp_path: Path) -> None:
    """Two writers replace one entry over and over; a reader gets one of the two each time, never damage."""
    cache, entries = Cache(tmp_path), [draw_entry(seed, size=20_000) for seed in (4, 5)]
    known = {digest_tensors(entry) for entry in entries}
    cache.write("latents", "ab", entries[0])
    stop = threading.Event()

    def write(entry: dict[str, torch.Tensor]) -> None:
        while not stop.is_set():
            cache.write("latents", "ab", entry)

    writers = [threading.Thread(target=write, args=(entry,)) for entry in entries]
    for writer in writers:
        writer.start()
    try:
        seen: list[str] = []
        while len(seen) < 150 or (set(seen) != known and len(seen) < 5000):
            entry = cache.read("latents", "ab")
            assert entry is not None
            seen.append(digest_tensors(entry))
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert set(seen) == known, "the test needs to see both writers"


def test_an_unwritable_cache_is_refused_before_work_begins(tmp_path: Path) -> None:
    Cache(tmp_path / "new" / "cache").check_writable()
    assert files_in(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file/cache: cannot be written \(Not a directory\)"):
        Cache(tmp_path / "file" / "cache").check_writable()


def test_keys_depend_on_every_part() -> None:
    parts = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": 1, "b": None}, {"a": [1, 2]}, {"a": [12]}]
    keys = {make_key(**part) for part in parts}
    assert len(keys) == len(parts)
    assert make_key(a=1, b=2) == make_key(b=2, a=1)


def test_tensor_digests_depend_on_names_types_shapes_and_bytes() -> None:
    x = torch.arange(6, dtype=torch.float32)
    variants = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(2, 3)},
        {"x": x.view(torch.int32)},
        {"x": x + 1},
        {"x": x, "z": x},
    ]
    assert len({digest_tensors(variant) for variant in variants}) == len(variants)
    assert digest_tensors({"x": x.reshape(2, 3).t()}) == digest_tensors({"x": x.reshape(2, 3).t().contiguous()})


def count_digests(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    import cogtune.cache

    calls: list[Path] = []
    monkeypatch.setattr(cogtune.cache, "digest_bytes", lambda path: calls.append(path) or digest_bytes(path))
    return calls


def test_a_file_is_digested_once_while_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_digests(monkeypatch)
    path = tmp_path / "video.mp4"
    path.write_bytes(b"content one")
    cache = Cache(tmp_path / "cache")
    digests = {cache.digest_file(path), Cache(tmp_path / "cache").digest_file(path)}
    assert digests == {hashlib.sha256(b"content one").hexdigest()}
    assert len(calls) == 1


def test_changed_content_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"content one")
    before, cache = path.stat(), Cache(tmp_path / "cache")
    first = cache.digest_file(path)
    path.write_bytes(b"content two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    assert cache.digest_file(path) == digest_bytes(path) != first


def test_a_damaged_memo_is_made_again(tmp_path: Path) -> None:
    path, cache = tmp_path / "video.mp4", Cache(tmp_path / "cache")
    path.write_bytes(b"content")
    cache.digest_file(path)
    (memo,) = files_in(cache.folder / "digests")
    for text in ('{"seen": [', "[]", "{}", "\x00", '{"seen": null, "digest": "wrong"}'):
        memo.write_text(text)
        assert cache.digest_file(path) == digest_bytes(path)


def test_a_components_digest_covers_weights_and_configs(tmp_path: Path) -> None:
    folder, cache = tmp_path / "vae", Cache(tmp_path / "cache")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(b"1")
    (folder / "README.md").write_text("one")
    digests = [cache.digest_folder(folder)]
    (folder / "README.md").write_text("two")
    assert cache.digest_folder(folder) == digests[0], "what no model reads changes nothing"
    (folder / "a.safetensors").write_bytes(b"2")
    digests.append(cache.digest_folder(folder))
    (folder / "config.json").write_text("[]")
    digests.append(cache.digest_folder(folder))
    (folder / "a.safetensors").rename(folder / "b.safetensors")
    digests.append(cache.digest_folder(folder))
    assert len(set(digests)) == 4
