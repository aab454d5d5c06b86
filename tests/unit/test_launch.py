"""What launchers say is read in one place, strictly."""

import re
from pathlib import Path

import pytest

from cogtune import launch
from cogtune.errors import UserError
from cogtune.launch import Launch, read_launch


def test_alone_and_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_launch({}) == Launch()
    told = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert read_launch(told) == Launch(9, 16, 1, 8, was_told=True)
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2"}).num_local == 2
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == read_launch(told)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four: must be a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: must be a number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_what_can_not_be_is_named(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_launch(wrong)


def test_nothing_else_reads_them() -> None:
    source = Path(launch.__file__)
    names = re.compile(r'"(LOCAL_)?(RANK|WORLD_SIZE)"')
    readers = [path.name for path in source.parent.rglob("*.py") if names.search(path.read_text(encoding="utf-8"))]
    assert readers == [source.name]
