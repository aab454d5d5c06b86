"""Uploads a finished folder with its model card to the Hugging Face hub.

The token is `HF_TOKEN`, or the one that `hf auth login` keeps; it is written nowhere.
"""

import importlib
from pathlib import Path

from cogtune.errors import UserError
from cogtune.formats.file_names import WEIGHTS_NAME

# What belongs to an adapter or a pipeline; logs, checkpoints and anything that can run code stay here.
_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]


def check_push(repository: str) -> None:
    """Raises `UserError` for a wrong name or a missing login, before any work is done."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository}: not a repository's name ({error}); give owner/name") from None
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {repository}: not logged in to the hub; run 'hf auth login', or set HF_TOKEN to "
            "a token with write access"
        )


def check_folder(folder: Path) -> None:
    """Raises `UserError` for what is neither an adapter's nor a pipeline's folder, or has no model card."""
    is_adapter, is_pipeline = any(folder.glob("*.safetensors")), (folder / "model_index.json").is_file()
    if not (is_adapter or is_pipeline):
        raise UserError(
            f"{folder}: neither an adapter ({WEIGHTS_NAME}) nor a pipeline (model_index.json); give a run's final/"
        )
    if not (folder / "README.md").is_file():
        raise UserError(
            f"{folder}: no README.md, the model card; write one that says what it is and how it was trained"
        )


def push_folder(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads the folder in one commit and gives the repository's URL; a new one is private unless `public`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    check_push(repository)
    check_folder(folder)
    api = HfApi(library_name="cogtune")
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=_PATTERNS,
            commit_message=f"Upload {folder.resolve().name} with cogtune",
        )
    except OfflineModeIsEnabled:
        raise UserError(f"--push-to-hub {repository}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except (HfHubHTTPError, *_network_errors(), OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push-to-hub {repository}: the upload failed ({reason}); check the name, the token's write access and "
            f"the network, then repeat it with: python scripts/push.py {folder} --push-to-hub {repository}"
        ) from None
    return str(url)


def _network_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it reaches no server: httpx's classes, or its successor's."""
    from huggingface_hub import get_session

    client = importlib.import_module(type(get_session()).__module__.split(".")[0])
    return (client.HTTPError,)
