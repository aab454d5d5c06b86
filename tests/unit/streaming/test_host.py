"""Host memory that a GPU copies from."""

import ctypes
import mmap
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
    """Asked by `msync`, which refuses where nothing is mapped: to read /proc takes memory, which in the child may come
    to lie right where the pages are missing."""
    pages, ordinary = take_unforked(1 << 20), torch.ones(1 << 20, dtype=torch.uint8)
    pages.fill_(7)
    msync, asynchronous = ctypes.CDLL(None).msync, 1
    places = [ctypes.c_void_p(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE) for tensor in (pages, ordinary)]
    length = ctypes.c_size_t(mmap.PAGESIZE)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            code = sum(2**bit for bit, place in enumerate(places) if not msync(place, length, asynchronous))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0b10, "a bit for each that is there"
    assert [msync(place, length, asynchronous) for place in places] == [0, 0]
    assert _find_mapping(pages.data_ptr()) == "rw-p"
    assert int(pages.min()) == int(pages.max()) == 7


@pytest.mark.parametrize("num_bytes", [0, 1, 5000])
def test_buffers_have_the_asked_size(num_bytes: int) -> None:
    buffer = HostBuffer(num_bytes, page_locked=False)
    assert buffer.bytes.dtype == torch.uint8
    assert buffer.bytes.numel() == num_bytes
