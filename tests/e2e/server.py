"""The real binary in a process of its own, and what tests ask it for besides the official client."""

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import openai

# A machine with other work may take long for what takes no time; what never happens fails all the same.
PATIENCE = 60
START_SECONDS = 180
STOP_SECONDS = 120


def binary() -> Path:
    return Path(os.environ["TIDEMILL_BIN"]).resolve()


def default_model() -> Path:
    return Path(os.environ["TIDEMILL_TEST_MODEL"]).resolve()


# Below those that systems give to outgoing connections, which could take one between the question and the server's start.
PORTS = "18000-30999"
_tried = itertools.count(os.getpid())


def own_ports() -> range:
    """The ports of this process: where several run tests at once, no two ask for the same one before their servers have them."""
    first, last = (int(port) for port in os.environ.get("TIDEMILL_TEST_PORTS", PORTS).split("-"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = (last + 1 - first) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return range(first + worker * share, first + (worker + 1) * share)


def free_port() -> int:
    """A port that nobody listens on; from TIDEMILL_TEST_PORTS (such as 18300-18399) where that is set. The next time another one."""
    allowed = own_ports()
    for _ in allowed:
        candidate = allowed[next(_tried) % len(allowed)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise RuntimeError(f"no free port in {allowed}")


def eventually(what: str, check, seconds: float = PATIENCE) -> None:
    """Waits until `check` holds."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.1)


def not_at_midnight() -> None:
    """What is counted by the day begins anew at midnight (UTC): shortly before, this waits until it has passed."""
    left = 86_400 - time.time() % 86_400
    if left < 120:
        time.sleep(left + 0.1)


@dataclass
class Answer:
    """A response as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json()["error"]


class Server:
    """`tidemill serve` with the given models (name to path) and further arguments."""

    def __init__(self, folder: Path, models: dict[str, Path], *arguments: str):
        self.port = free_port()
        self.data = folder / "data"
        self.log_path = folder / f"server-{self.port}.log"
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self.model = next(iter(models), None)
        command = [binary(), "serve", "--host", "127.0.0.1", "--port", str(self.port), "--data", self.data]
        for name, path in models.items():
            command += ["--model", f"{name}={path}"]
        # No variable of the surrounding shell and no tidemill.toml of the working directory has a say.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEMILL_")}
        # Trainings must get on even where other work keeps the cores busy.
        environment["TIDEMILL_TRAINING_PRIORITY"] = "low"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command + list(arguments)],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder, env=environment,
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            try:
                if self.get("/ready").status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the server was not ready after {START_SECONDS} s:\n{self.log()}")

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None, timeout: float = 240) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, body, **options) -> Answer:
        """`body` is sent as it is when it is bytes, else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"content-type": "application/json"}, **options)

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, **{"api_key": "none", "max_retries": 0, "timeout": 240, **options})

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.base_url, **{"api_key": "none", "max_retries": 0, "timeout": 240, **options})

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics, summed over their labels."""
        sums: dict[str, float] = {}
        for line in self.get("/metrics").body.decode().splitlines():
            match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{.*\})? (\S+)", line)
            if match:
                sums[match[1]] = sums.get(match[1], 0.0) + float(match[2])
        return sums

    def wait_idle(self, seconds: float = PATIENCE) -> dict[str, float]:
        """Waits until nothing runs or waits; returns the metrics of that moment."""
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            if metrics.get("tidemill:num_requests_running") == 0 and metrics.get("tidemill:num_requests_waiting") == 0:
                return metrics
            assert time.monotonic() < deadline, f"still busy after {seconds} s: {metrics}"
            time.sleep(0.02)

    def assert_alive(self) -> None:
        assert self.process.poll() is None, self.log()
        answer = self.post(
            "/v1/chat/completions",
            {"model": self.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2, "temperature": 0},
        )
        assert answer.status == 200, answer.body

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
