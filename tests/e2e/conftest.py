"""Fixtures: servers with the default model, an exact one, and one with the tiny models of all families.

TIDEMILL_BIN names the binary, TIDEMILL_TEST_MODEL the default model's GGUF file. Without them nothing can be proved, so the run
fails instead of skipping.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from server import Server, default_model  # noqa: E402

GOLDENS = Path(__file__).parent.parent / "goldens"
MODEL = "smollm2"
FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3"]


def pytest_configure():
    for variable in ["TIDEMILL_BIN", "TIDEMILL_TEST_MODEL"]:
        if not Path(os.environ.get(variable, "")).is_file():
            pytest.exit(f"{variable} must name a file (run `make test-e2e`)", returncode=2)


# Those that take longest, the longest first: where several processes share the files, none of them is left with one of these at the end.
LONG = ["fine_tuning", "openapi", "keys", "training", "durability", "labeling", "label_studio", "demos", "network", "reinforcement"]


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def golden(path: str) -> dict:
    return json.loads((GOLDENS / path).read_text(encoding="utf-8"))


@contextmanager
def running(folder: Path, models: dict[str, Path], *arguments: str):
    """A ready server that is gone afterwards and was not killed by what happened to it."""
    server = Server(folder, models, *arguments)
    try:
        yield server.wait_ready()
        assert server.process.poll() is None, f"the server ended with {server.process.returncode}:\n{server.log()[-4000:]}"
        assert "panicked" not in server.log(), server.log()[-4000:]
    finally:
        server.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The default model as `tidemill serve` runs it, with room for 200 waiting requests."""
    with running(tmp_path_factory.mktemp("server"), {MODEL: default_model()}, "--max-waiting", "256") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def start(tmp_path):
    """Starts servers of a test's own: `start(arguments…, models={…})` waits until ready, `ready=False` does not."""
    started = []

    def launch(*arguments: str, models: dict[str, Path] | None = None, ready: bool = True) -> Server:
        folder = tmp_path / f"run{len(started)}"
        folder.mkdir()
        server = Server(folder, {MODEL: default_model()} if models is None else models, *arguments)
        started.append(server)
        return server.wait_ready() if ready else server

    yield launch
    for server in started:
        server.kill()
