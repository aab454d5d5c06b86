"""Host memory that a GPU copies from."""

import os
import sys
from pathlib import Path

import pytest
import torch

from cogtune.streaming.host import HostBuffer, take_unforked


def _find_mapping(address: int) -> str | None:
    """The rights of the pages at an address, such as rw-p (private); None where nothing is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        pages, rights = line.split()[:2]
        first, end = pages.split("-")
        if int(first, 16) <= address < int(end, 16):
            return rights
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems copy all memory")
def test_forked_processes_do_not_get_page_locked_memory() -> None:
    pages, ordinary = take_unforked(1 << 20), torch.ones(1 << 20, dtype=torch.uint8)
    pages.fill_(7)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = [_find_mapping(tensor.data_ptr()) is not None for tensor in (ordinary, pages)]
            code = 0 if found == [True, False] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _find_mapping(pages.data_ptr()) == "rw-p"
    assert int(pages.min()) == int(pages.max()) == 7


@pytest.mark.parametrize("num_bytes", [0, 1, 5000])
def test_buffers_have_the_asked_size(num_bytes: int) -> None:
    buffer = HostBuffer(num_bytes, page_locked=False)
    assert buffer.bytes.dtype == torch.uint8
    assert buffer.bytes.numel() == num_bytes
