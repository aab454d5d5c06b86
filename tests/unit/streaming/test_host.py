"""Host memory that a GPU copies from."""

import os
import sys
from pathlib import Path

import pytest
import torch

from cogtune.streaming.host import HostBuffer, take_unforked


def _is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems copy all memory")
def test_forked_processes_do_not_get_page_locked_memory() -> None:
    pages, ordinary = take_unforked(1 << 20), torch.ones(1 << 20, dtype=torch.uint8)
    pages.fill_(7)
    child = os.fork()
    if child == 0:
        os._exit(2 * _is_mapped(ordinary.data_ptr()) + _is_mapped(pages.data_ptr()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert _is_mapped(pages.data_ptr())
    assert int(pages.min()) == int(pages.max()) == 7


@pytest.mark.parametrize("num_bytes", [0, 1, 5000])
def test_buffers_have_the_asked_size(num_bytes: int) -> None:
    buffer = HostBuffer(num_bytes, page_locked=False)
    assert buffer.bytes.dtype == torch.uint8
    assert buffer.bytes.numel() == num_bytes
