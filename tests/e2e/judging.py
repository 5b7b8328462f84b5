"""What feedback tests share: rows of the SQLite file, and a client that sends as fast as it can."""

import json
import socket
import sqlite3
import struct
import threading
from pathlib import Path


def rows(data: Path, sql: str, *values) -> list[sqlite3.Row]:
    """Reads the database of a data directory, beside the server or after it."""
    connection = sqlite3.connect(f"file:{data / 'tidemill.db'}?mode=ro", uri=True, timeout=60)
    connection.row_factory = sqlite3.Row
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


def bare(answer_id: str) -> str:
    return answer_id.removeprefix("chatcmpl-").removeprefix("cmpl-")


def integers(blob: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(blob) // 4}I", blob))


def floats(blob: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(blob) // 4}f", blob))


class Sender(threading.Thread):
    """Sends one feedback after another over one connection until the server dies or `stop` is set. What was acknowledged is in
    `acknowledged`, as pairs of the feedback's id and the comment that was sent with it."""

    def __init__(self, port: int, target: str, name: str, stop: threading.Event):
        super().__init__(daemon=True)
        self.port, self.target, self.label, self.stop_flag = port, target, name, stop
        self.acknowledged: list[tuple[str, str]] = []
        self.refused: list[bytes] = []
        self.start()

    def run(self) -> None:
        number = 0
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not self.stop_flag.is_set():
                    comment = f"{self.label}-{number}"
                    number += 1
                    body = json.dumps({"target": self.target, "kind": "comment", "value": comment}).encode()
                    head = f"POST /v1/feedback HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)
                    answer = self.receive(connection)
                    if answer is None:
                        return
                    if not answer.startswith(b"HTTP/1.1 201"):
                        self.refused.append(answer)
                        continue
                    start = answer.index(b'"id":"') + 6
                    self.acknowledged.append((answer[start : start + 36].decode(), comment))
        except OSError:
            return

    @staticmethod
    def receive(connection: socket.socket) -> bytes | None:
        data = b""
        while True:
            piece = connection.recv(65536)
            if not piece:
                return None
            data += piece
            end = data.find(b"\r\n\r\n")
            if end >= 0:
                at = data.lower().index(b"content-length: ") + 16
                if len(data) >= end + 4 + int(data[at : data.index(b"\r\n", at)]):
                    return data


def patch(server, path: str, body, method: str = "PATCH"):
    return server.request(method, path, json.dumps(body).encode(), {"content-type": "application/json"})


