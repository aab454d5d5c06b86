"""SAT's autoencoder to diffusers and back: equal outputs against SAT's own rules, equal bits, wrong keys refused."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from sat_reference import Autoencoder

from cogtune.errors import UserError
from cogtune.formats import converting, sat_vae
from cogtune.formats.tensors import Tensors, hold
from cogtune.formats.torch_file import open_torch_file
from cogtune.formats.writing import write_torch_file

SMALL = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 2, "latent_channels": 6}


def make_vae(dtype: torch.dtype = torch.float64) -> AutoencoderKLCogVideoX:
    torch.manual_seed(1)
    vae = AutoencoderKLCogVideoX(**SMALL).eval().requires_grad_(False).to(dtype)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


def make_config(vae: AutoencoderKLCogVideoX) -> dict[str, Any]:
    return json.loads(vae.to_json_string())


def read_all(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensors.read(name) for name in tensors.specs}


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_diffusers_computes_what_sat_computes(num_frames: int, tmp_path: Path) -> None:
    vae = make_vae()
    names = sat_vae.to_sat(hold("vae", vae.state_dict()), make_config(vae)).specs
    generator = torch.Generator().manual_seed(2)
    state = {n: 0.2 * torch.randn(s.shape, generator=generator, dtype=torch.float64) for n, s in names.items()}
    write_torch_file(hold("sat", state | {"loss.logvar": torch.zeros(1)}), tmp_path / "3d-vae.pt", under="state_dict")
    tensors, notes = sat_vae.split_off(open_torch_file(tmp_path / "3d-vae.pt"))
    assert notes == ["left out: 1 tensor(s) of the training loss, first loss.logvar"]
    vae.load_state_dict(read_all(sat_vae.from_sat(tensors, make_config(vae))), strict=True)
    reference = Autoencoder(state, groups=4)
    pixels = torch.randn(1, 3, num_frames, 16, 24, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        moments = vae.encode(pixels).latent_dist.parameters
        expected = reference.encode(pixels)
        # The library clamps nothing here: `parameters` are as the encoder gives them.
        torch.testing.assert_close(moments, expected, rtol=1e-9, atol=1e-9)
        latents = torch.randn(1, 6, (num_frames - 1) // 4 + 1, 2, 3, generator=generator, dtype=torch.float64)
        decoded, expected = vae.decode(latents).sample, reference.decode(latents)
    assert decoded.shape == expected.shape and decoded.std() > 0.05
    torch.testing.assert_close(decoded, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact_also_out_of_a_whole_checkpoint(dtype: torch.dtype) -> None:
    vae = make_vae(dtype)
    config, state = make_config(vae), vae.state_dict()
    wholes = read_all(sat_vae.to_sat(hold("vae", state), config))
    inside = {f"first_stage_model.{name}": tensor for name, tensor in wholes.items()}
    for given in (wholes, inside | {"model.diffusion_model.x": torch.zeros(1)}):
        back = sat_vae.from_sat(sat_vae.split_off(hold("file.pt", given))[0], config)
        assert list(back.specs) == list(state)
        assert all(torch.equal(back.read(name), tensor) for name, tensor in state.items())


def test_config_of_the_released_autoencoder_is_derived() -> None:
    wanted = make_config(AutoencoderKLCogVideoX.from_config({}))
    specs = sat_vae.vae_specs(wanted)
    names = sat_vae.to_sat(Tensors("vae", specs, lambda name: torch.zeros(1)), wanted).specs
    found = sat_vae.derive_config(Tensors("file.pt", names, lambda name: torch.zeros(1)), 0.7)
    assert found == wanted | {"scaling_factor": 0.7}


@pytest.mark.parametrize("case", ["missing", "unknown", "shape", "another file"])
def test_wrong_files_are_refused(case: str) -> None:
    vae = make_vae()
    state = read_all(sat_vae.to_sat(hold("vae", vae.state_dict()), make_config(vae)))
    key = "decoder.up.0.block.0.conv1.conv.weight"
    if case == "missing":
        del state[key]
        message = rf"1 missing key\(s\), first {key}"
    elif case == "unknown":
        state["encoder.extra"], message = torch.zeros(1), r"1 unknown key\(s\), first encoder.extra"
    elif case == "shape":
        state[key], message = state[key][:3], r"conv1.conv.weight is \[3, 16, 3, 3, 3\] and should be \[8, 16"
    else:
        with pytest.raises(UserError, match="is this the autoencoder's file of a SAT CogVideoX"):
            sat_vae.derive_config(hold("file.pt", {"transformer.weight": torch.zeros(1)}), 0.7)
        return
    with pytest.raises(UserError, match=message):
        sat_vae.from_sat(hold("file.pt", state), make_config(vae))


def test_a_given_factor_leaves_the_bases_other_conventions(variant_folder: Callable[[str], Path]) -> None:
    """1.5's image-to-video autoencoder divides by the factor (`invert_scale_latents`), which no tensor shows."""
    base = str(variant_folder("tiny-1.5-i2v"))
    options = argparse.Namespace(config=None, base=base, part="vae", positions=None, scaling_factor=0.5)
    config = converting._given_config(options)
    assert config is not None
    assert config["invert_scale_latents"] is True and config["scaling_factor"] == 0.5
    options.scaling_factor = None
    assert converting._given_config(options) == config | {"scaling_factor": 0.7}
