"""One decoding process of `cogtune.decoding`: reads requests from a connection, answers with pixels or a problem.

    python -m cogtune.decode_worker FILE_DESCRIPTOR

A module of its own, so that starting one imports the decoders and nothing else of the program.
"""

import sys
from multiprocessing.connection import Connection

import torch

from cogtune.video import ClipError, load_clip


def main() -> None:
    """Serves until the other end closes."""
    torch.set_num_threads(1)
    pipe: Connection = Connection(int(sys.argv[1]))
    pipe.send("ready")
    while True:
        try:
            options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((load_clip(**options), None, None))
        except ClipError as error:
            pipe.send((None, error.kind, str(error)))


if __name__ == "__main__":
    main()
