"""Batches through encoding in order; the producing thread ends, and tells what went wrong."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from cogtune.overlap import Batch, Producer, encode_overlapped


def make_batches(count: int) -> Iterator[Batch]:
    for number in range(count):
        yield [f"key{number}"], torch.full((1, 2), float(number))


def test_results_arrive_in_order_with_their_keys() -> None:
    written: dict[str, float] = {}

    def write(keys: list[str], results: tuple[torch.Tensor, ...]) -> None:
        written.update({key: float(row[0]) for key, row in zip(keys, results[0], strict=True)})

    times = encode_overlapped(make_batches(5), lambda values: (values * 2,), write, torch.device("cpu"))
    assert written == {f"key{number}": 2.0 * number for number in range(5)}
    assert list(written) == [f"key{number}" for number in range(5)]
    assert times.num_items == 5 and 0 < times.busy_seconds <= times.wall_seconds and 0 < times.busy_share <= 1


def test_nothing_to_do_takes_no_time() -> None:
    times = encode_overlapped(iter(()), lambda values: (values,), lambda *_: None, torch.device("cpu"))
    assert times.num_items == 0 and times.busy_share == 0.0


def test_the_producer_keeps_order_and_stays_a_little_ahead() -> None:
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(make_batches(8)):
            made.append(number)
            yield batch

    with Producer(batches(), prepare=lambda tensor: tensor + 1) as producer:
        stream = iter(producer)
        keys, tensor = next(stream)
        assert keys == ["key0"] and tensor[0, 0] == 1.0
        time.sleep(0.2)
        assert len(made) <= 5
        assert [keys[0] for keys, _ in stream] == [f"key{number}" for number in range(1, 8)]


def test_what_producing_raises_is_raised_here() -> None:
    def batches() -> Iterator[Batch]:
        yield from make_batches(1)
        raise KeyError("no such clip")

    with pytest.raises(KeyError, match="no such clip"), Producer(batches(), prepare=lambda tensor: tensor) as producer:
        list(producer)


def test_giving_up_early_ends_the_thread() -> None:
    with Producer(make_batches(1000), prepare=lambda tensor: tensor) as producer:
        next(iter(producer))
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
