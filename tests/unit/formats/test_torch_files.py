"""torch's files: written tensor by tensor, read without running code, `latest` followed."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cogtune.errors import UserError
from cogtune.formats.sat_folder import find_sat_file, open_sat, write_sat_folder
from cogtune.formats.tensors import cast, hold
from cogtune.formats.torch_file import load_plain, open_torch_file
from cogtune.formats.writing import write_safetensors, write_sharded, write_torch_file


def make_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "half": torch.randn(7, 5, generator=generator).half(),
        "brain": torch.randn(300, 40, generator=generator).bfloat16(),
        "full": torch.randn(3, generator=generator),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.5),
        "counts": torch.arange(9),
        "truth": torch.tensor([True, False]),
    }


def test_torch_file_holds_what_torch_save_would_write(tmp_path: Path) -> None:
    state = make_state()
    write_torch_file(hold("state", state), tmp_path / "ours.pt", under="module")
    for mapped in (True, False):
        stock = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mapped)
        assert list(stock) == ["module"] and list(stock["module"]) == list(state)
        assert all(torch.equal(stock["module"][name], tensor) for name, tensor in state.items())
    opened = open_torch_file(tmp_path / "ours.pt")
    for _ in range(2):  # read again after its memory was given back
        assert all(torch.equal(opened.read(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("under", ["module", "model", "state_dict", None])
def test_tensors_are_found_wherever_they_lie(under: str | None, tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    torch.save({under: state, "iteration": 3} if under else state, tmp_path / "file.pt")
    assert list(open_torch_file(tmp_path / "file.pt").specs) == ["a"]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"module": {"a": torch.ones(1)}, "extra": Payload(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="could run code when read"):
        open_torch_file(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run it"


def test_random_states_of_a_training_checkpoint_are_plain_data(tmp_path: Path) -> None:
    extra = {"np_rng_state": np.random.default_rng(1).integers(0, 9, 5).astype(np.uint32), "rng": torch.get_rng_state()}
    torch.save({"module": {"a": torch.ones(1)}, **extra}, tmp_path / "file.pt")
    assert list(open_torch_file(tmp_path / "file.pt").specs) == ["a"]


@pytest.mark.parametrize("case", ["cut", "text", "old", "none"])
def test_unreadable_files_say_so(case: str, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    if case == "cut":
        torch.save({"a": torch.randn(1000)}, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif case == "text":
        file.write_text("<html>not found</html>")
    elif case == "old":
        file.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save({"a": 1}, file)
    with pytest.raises(UserError, match=r"not a readable torch file|no tensors in it|could run code"):
        open_torch_file(file)


def test_latest_names_the_iteration(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    write_sat_folder(hold("", state), tmp_path, iteration="500")
    assert (tmp_path / "latest").read_text() == "500"
    for given in (tmp_path, tmp_path / "500", tmp_path / "500" / "mp_rank_00_model_states.pt"):
        assert torch.equal(open_sat(given).read("a"), state["a"])
    (tmp_path / "latest").write_text("600\n")
    with pytest.raises(UserError, match=r"latest: names '600', and there is no such folder"):
        find_sat_file(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match="no such folder"):
        find_sat_file(tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.raises(UserError, match="no 'latest' file"):
        find_sat_file(tmp_path)
    (tmp_path / "500" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(UserError, match="split over model-parallel ranks"):
        find_sat_file(tmp_path / "500")
    with pytest.raises(UserError, match="no such file or folder"):
        find_sat_file(tmp_path / "nowhere")


def test_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from cogtune.formats.tensors import open_safetensors

    state = make_state()
    write_safetensors(hold("state", state), tmp_path / "one.safetensors", metadata={"who": "me"})
    stock = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(stock[name], tensor) for name, tensor in state.items()) and len(stock) == len(state)
    (tmp_path / "many").mkdir()
    files = write_sharded(hold("state", state), tmp_path / "many", "model", max_shard_bytes=100)
    assert [file.name for file in files][:2] == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    opened = open_safetensors(tmp_path / "many")
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in state.items())


def test_cast_refuses_what_the_precision_cannot_hold() -> None:
    tensors = hold("model", {"weight": torch.tensor([1.0, 1e5]), "count": torch.arange(3)})
    assert cast(tensors, torch.bfloat16).read("weight").dtype == torch.bfloat16
    assert cast(tensors, torch.bfloat16).read("count").dtype == torch.int64
    with pytest.raises(UserError, match=r"weight has values up to 1e\+05, beyond what float16 holds"):
        cast(tensors, torch.float16).read("weight")


def test_allowed_records_are_those_that_were_named(tmp_path: Path) -> None:
    torch.save({"path": Path("x")}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="could run code"):
        load_plain(tmp_path / "file.pt")
