"""GPU tests: skipped without CUDA. On a machine with a GPU: `python -m pytest tests/gpu`."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder, and says why it is skipped where there is no GPU."""
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; run `python -m pytest tests/gpu` on one"))
