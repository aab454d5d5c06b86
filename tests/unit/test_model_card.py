"""Model cards that the hub takes: its front matter names a repository as the base, never a folder."""

from pathlib import Path

import pytest
import yaml

from cogtune.model_card import is_hub_name, make_derived_card


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("cogvideox-5b", "zai-org/CogVideoX-5b"),
        ("owner/model", "owner/model"),
        ("/data/models/mine", None),
        ("./mine", None),
        ("tiny", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("is_adapter", [True, False])
def test_base_is_a_repository_or_left_out(base: str | None, named: str | None, is_adapter: bool) -> None:
    card = make_derived_card("mine", base=base, made="Converted", is_adapter=is_adapter)
    assert front_matter(card).get("base_model") == named
    assert ("lora" in front_matter(card)["tags"]) == is_adapter
    assert ("load_lora_weights" in card) == is_adapter and "Converted, with cogtune." in card
    assert base is None or "/data" not in card


def test_a_folder_of_that_name_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("runs/final")
    (tmp_path / "runs" / "final").mkdir(parents=True)
    assert not is_hub_name("runs/final")
