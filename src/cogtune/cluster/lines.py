"""JSON objects, one a line, over TCP: how the ranks of a job speak with the hub."""

import json
import socket
from typing import Any

_MOST_BYTES = 1 << 20  # of a line; nobody of ours sends more
_SILENCE_SECONDS = 30

Message = dict[str, Any]


class Line:
    """One end of a connection; `read` and `send` raise `OSError` where the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._buffer = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel answers for a busy process, so only a dead host or a cut cable is silent for so long.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _SILENCE_SECONDS // 3),
            ("TCP_KEEPINTVL", _SILENCE_SECONDS // 6),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * _SILENCE_SECONDS),
        ):
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Sends a whole message."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[Message]:
        """Waits for data and returns the messages that it completes; raises `ConnectionError` at the end."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("closed by the other end")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _MOST_BYTES:
            raise ConnectionError("a line without an end")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise ConnectionError("not a message of ours") from None
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("not a message of ours")
        return messages

    def close(self) -> None:
        """Closes this end."""
        self.socket.close()
