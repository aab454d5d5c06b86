"""Whole videos through our way of running the autoencoder equal the stock way's, frame group by frame group."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogtune.vae import slabs
from cogtune.vae.frame_coder import FrameCoder
from cogtune.vae.layers import activate


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    for parameter in model.parameters():  # default norms would hide a wrong factor or summand
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 17, 25])
def test_encoding_and_decoding_equal_the_stock_ways(vae: AutoencoderKLCogVideoX, num_frames: int) -> None:
    pixels = torch.rand(2, 3, num_frames, 32, 48, generator=torch.Generator().manual_seed(num_frames)) * 2 - 1
    moments = vae.encode(pixels).latent_dist.parameters
    latents = moments[:, :16]
    frames = vae.decode(latents).sample
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    for way in ({}, {"stacked": True}, {"in_slabs": True}):
        coder = FrameCoder(vae, **way)
        torch.testing.assert_close(coder.encode(pixels), moments, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(coder.decode(latents), frames, rtol=1e-4, atol=2e-5)
    assert frames.std() > 0.02
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_slabs_have_no_seams_and_take_less_memory(vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 nothing is left of a difference. What waits on the host is not counted."""
    wide = copy.deepcopy(vae).double()
    latents = torch.randn(1, 16, 5, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with LiveBytes() as whole:
        expected = FrameCoder(wide).decode(latents)
    with LiveBytes() as in_slabs:
        monkeypatch.setattr(slabs, "to_host", in_slabs.uncounted(slabs.to_host))
        got = FrameCoder(wide, in_slabs=True).decode(latents)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert in_slabs.peak < 0.35 * whole.peak


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes that tensors made inside had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()
        self._counting = True

    def uncounted(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any) -> torch.Tensor:
            self._counting = False
            try:
                return function(*args)
            finally:
                self._counting = True

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._counting:
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._known.add(storage._cdata)
                    self._live += storage.nbytes()
                    self.peak = max(self.peak, self._live)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self._live -= num_bytes


def test_frame_groups_matter(vae: AutoencoderKLCogVideoX) -> None:
    """Why groups stay as short as the stock ones: the norms' statistics are a group's."""
    pixels = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    expected = FrameCoder(vae).encode(pixels)
    vae.num_sample_frames_batch_size = 16
    try:
        longer = FrameCoder(vae).encode(pixels)
    finally:
        vae.num_sample_frames_batch_size = 8
    assert (longer - expected).abs().max() > 1e-2


def test_the_compiled_activation_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 8).requires_grad_(False)
    values, kept = torch.randn(1, 8, 3, 4, 6), torch.randn(1, 8, 2, 4, 6)
    modulation = (torch.randn(1, 8, 3, 2, 3), torch.randn(1, 8, 3, 2, 3))
    compiled = torch.compile(activate, dynamic=False, fullgraph=True)
    bias = torch.randn(8)
    expected = activate(values, bias, norm, modulation, kept)
    assert expected.shape == (1, 8, 5, 4, 6)
    torch.testing.assert_close(compiled(values, bias, norm, modulation, kept), expected)


def test_the_callers_tf32_setting_holds_inside(vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        FrameCoder(vae).encode(torch.zeros(1, 3, 1, 8, 8))
        assert torch.backends.cudnn.allow_tf32 is allowed
