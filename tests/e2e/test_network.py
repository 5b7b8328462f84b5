"""The server towards a network: TLS and its renewal, HTTP/2, pages of other origins, bounds on heads, bodies and connections."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx2
import openai
import pytest

from conftest import MODEL
from queues import new_key
from server import PATIENCE, Server

PAGE = "https://app.example.com"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count to ten."}], "temperature": 0}


class Certificate:
    """A certificate for 127.0.0.1 that vouches for itself."""

    def __init__(self, folder: Path, name: str, *extensions: str):
        self.chain, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}",
             *(part for extension in ["subjectAltName=IP:127.0.0.1", *extensions] for part in ("-addext", extension)),
             "-keyout", self.key, "-out", self.chain],
            check=True, capture_output=True,
        )

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.chain))


class TlsServer(Server):
    """Asks over TLS, trusting the certificate that it was started with."""

    def __init__(self, folder: Path, models, certificate: Certificate, *arguments: str):
        self.chain, self.key = folder / "server.pem", folder / "server.key"
        shutil.copy(certificate.chain, self.chain)
        shutil.copy(certificate.key, self.key)
        super().__init__(folder, models, "--tls-certificate", self.chain, "--tls-key", self.key, *arguments)
        self.root = f"https://127.0.0.1:{self.port}"
        self.base_url = f"{self.root}/v1"
        self.trust = certificate.trust()

    def get(self, path: str):
        try:
            answer = httpx2.get(self.root + path, verify=self.trust, timeout=240)
        except httpx2.ConnectError as error:  # it does not listen yet
            raise ConnectionRefusedError from error
        return type("Answer", (), {"status": answer.status_code, "headers": answer.headers, "body": answer.content})

    def serves(self, certificate: Certificate) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            try:
                with certificate.trust().wrap_socket(connection, server_hostname="127.0.0.1"):
                    return True
            except ssl.SSLCertVerificationError:
                return False

    def until(self, condition, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()[-4000:]
            time.sleep(0.2)


@pytest.fixture
def start_tls(tmp_path):
    started = []

    def launch(certificate: Certificate, *arguments: str) -> TlsServer:
        from server import default_model

        folder = tmp_path / f"tls{len(started)}"
        folder.mkdir()
        started.append(TlsServer(folder, {MODEL: default_model()}, certificate, *arguments))
        return started[-1].wait_ready()

    yield launch
    for server in started:
        server.kill()


def test_tls_http_2_and_a_renewal_during_a_stream(tmp_path, start_tls):
    first, second = Certificate(tmp_path, "first"), Certificate(tmp_path, "second")
    server = start_tls(first)

    # The official client over TLS; ALPN chooses HTTP/2 where the client can, HTTP/1.1 where it cannot.
    for http2, version in [(True, "HTTP/2"), (False, "HTTP/1.1")]:
        with httpx2.Client(verify=server.trust, http2=http2, timeout=240) as plain:
            assert plain.get(f"{server.root}/health").http_version == version
            client = openai.OpenAI(base_url=server.base_url, api_key="none", http_client=plain, max_retries=0)
            assert client.chat.completions.create(**CHAT, max_tokens=4).usage.completion_tokens == 4
            pieces = list(client.chat.completions.create(**CHAT, max_tokens=4, stream=True))
            assert pieces[-1].choices[0].finish_reason == "length"

    # Nothing in plain text, and no handshake for what is not TLS.
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP/1.1 200" not in plain.recv(1000)

    # Half a pair changes nothing and is said once; the whole pair is used by new connections, while the stream of an old one goes on.
    with httpx2.Client(verify=server.trust, http2=True, timeout=240) as plain:
        client = openai.OpenAI(base_url=server.base_url, api_key="none", http_client=plain, max_retries=0)
        # More than HTTP/2's window and the server's queue hold: it cannot be over before it is read.
        stream = client.chat.completions.create(
            **CHAT, max_tokens=900, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        shutil.copy(second.key, server.key)
        server.until(lambda: "could not be renewed" in server.log())
        assert server.serves(first) and not server.serves(second)
        shutil.copy(second.chain, server.chain)
        server.until(lambda: server.serves(second))
        assert not server.serves(first)
        assert "was renewed" in server.log()
        usage = [chunk.usage for chunk in stream if chunk.usage]
        assert usage[-1].completion_tokens == 900
        # The old connection is as good as before.
        assert plain.get(f"{server.root}/health").status_code == 200
    assert server.stop() == 0


def test_a_certificate_that_cannot_be_used_stops_the_start(tmp_path, start):
    pair, other = Certificate(tmp_path, "one"), Certificate(tmp_path, "other")
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("nothing")
    for chain, key, said in [
        (pair.chain, other.key, "cannot be used"),
        (no_pem, pair.key, "no.pem"),
        (pair.chain, tmp_path / "absent.key", "absent.key"),
    ]:
        server = start("--tls-certificate", chain, "--tls-key", key, ready=False)
        assert server.process.wait(PATIENCE) == 1
        assert said in server.log(), server.log()
    server = start("--tls-certificate", pair.chain, ready=False)
    assert server.process.wait(PATIENCE) != 0
    assert "tls_key" in server.log()


def preflight(server, origin: str, method: str = "POST", path: str = "/v1/chat/completions"):
    return server.request("OPTIONS", path, headers={
        "origin": origin, "access-control-request-method": method, "access-control-request-headers": "authorization,content-type,x-stainless-os",
    })


def test_pages_of_named_origins_may_call(start):
    server = start("--cors-origins", f"{PAGE}, http://localhost:3000")
    secret = new_key(server, "chat")

    # A browser asks without the key.
    for origin in [PAGE, "http://localhost:3000"]:
        answer = preflight(server, origin)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"]
        assert all(name in allowed for name in ["authorization", "content-type", "x-stainless-os"])
        assert "origin" in answer.headers["vary"].lower()
    for origin in ["https://evil.example.com", "http://app.example.com", f"{PAGE}.evil.com", "null"]:
        assert "access-control-allow-origin" not in preflight(server, origin).headers

    # The request itself needs the key, and a refusal can be read by the page.
    refused = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 2})
    assert refused.status == 401 and "access-control-allow-origin" not in refused.headers
    headers = {"content-type": "application/json", "origin": PAGE}
    refused = server.request("POST", "/v1/chat/completions", b"{}", headers)
    assert refused.status == 401 and refused.headers["access-control-allow-origin"] == PAGE
    answer = server.request("GET", "/v1/models", headers={**headers, "authorization": f"Bearer {secret}"})
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    # Cookies are never asked for.
    assert "access-control-allow-credentials" not in answer.headers


def test_without_origins_no_page_may_call(server):
    answer = preflight(server, PAGE)
    assert answer.status == 405 and "access-control-allow-origin" not in answer.headers
    answer = server.request("GET", "/v1/models", headers={"origin": PAGE})
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers


def send_and_read(server, data: bytes) -> bytes:
    """Sends and reads until the server closes, which it may do before it has read all."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
    return received


def test_heads_bodies_and_silence_are_bounded(start):
    server = start("--idle-timeout", "1s", "--body-timeout", "1s", "--max-body", "100KiB")
    many = b"".join(b"x-%d: a\r\n" % index for index in range(2000))
    long = b"x-long: " + b"a" * 100_000 + b"\r\n"
    for head in [many, long]:
        answer = send_and_read(server, b"GET /health HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 431"), answer[:200]
    post = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    assert send_and_read(server, post + b"content-length: 1000\r\n\r\n{").startswith(b"HTTP/1.1 408")
    assert send_and_read(server, post + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n").startswith(b"HTTP/1.1 408")
    assert send_and_read(server, post + b"content-length: 200000\r\n\r\n" + b"x" * 200_000).startswith(b"HTTP/1.1 413")
    # Silence, half a head, and a connection kept for a next request that never comes.
    assert send_and_read(server, b"") == b""
    assert not send_and_read(server, b"GET /health HTTP/1.1\r\nhost:").startswith(b"HTTP/1.1 200")
    assert send_and_read(server, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    server.assert_alive()


def test_more_connections_than_allowed_wait_their_turn(start):
    server = start("--max-connections", "4", "--idle-timeout", "2s")
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(4)]
    # It is answered once the idle ones are closed.
    answer = server.get("/health")
    assert answer.status == 200
    for connection in held:
        connection.close()
