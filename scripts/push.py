"""Uploads a finished adapter or pipeline folder with its model card to the Hugging Face hub.

python scripts/push.py runs/my-lora/final --push-to-hub OWNER/NAME

The token is HF_TOKEN's or the one that 'hf auth login' keeps. A new repository is private, unless --public is given.
"""

from pathlib import Path

from cogtune.errors import run_command
from cogtune.formats.arguments import add_hub, check_options, make_parser
from cogtune.formats.hub import push_folder


def main() -> None:
    """Check, upload."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("folder", type=Path, help="a run's final/ folder, or what convert.py and export.py wrote")
    add_hub(parser, required=True)
    options = check_options(parser.parse_args())
    print(push_folder(options.folder, options.push_to_hub, public=options.public))


if __name__ == "__main__":
    run_command(main)
