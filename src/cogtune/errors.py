"""The one error class for mistakes of the user, and how a command ends on it.

`UserError` carries a message with the key or file, the value seen, the rule and the remedy. `run_command` turns it
into `error: ...` on standard error and exit code 2. Any other exception is a defect of ours: its traceback shows and
the exit code is 1.
"""

import difflib
import sys
import traceback
from collections.abc import Callable

_listeners: list[Callable[[str, int], object]] = []


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, why and how to mend it."""


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?` for the closest known name, or nothing where none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def on_failure(listener: Callable[[str, int], object] | None) -> None:
    """Lets `listener(message, exit code)` hear of this command's failure, before it says so; None: nobody.

    With several processes, the others have to end as well. The listener may end the process.
    """
    _listeners[:] = [] if listener is None else [listener]


def _tell(message: str, code: int) -> None:
    for listener in _listeners:
        listener(message, code)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `UserError` becomes one message and exit code 2."""
    try:
        main()
    except UserError as error:
        _tell(str(error), 2)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _tell("interrupted", 130)
        print("interrupted; nothing half-written is left, start the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _listeners:
            traceback.print_exc()
            _tell(f"{type(error).__name__}: {error}", 1)
        raise
