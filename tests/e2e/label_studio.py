"""The real Label Studio in a process of its own, alone on this machine, and what tests ask it for as its clients do."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 600
OWNER = "owner@example.com"
TOKEN = "0123456789abcdef0123456789abcdef01234567"


class LabelStudio:
    """`label-studio start` on SQLite in `folder`; the program is named by TIDEMILL_LABEL_STUDIO."""

    def __init__(self, folder: Path, port: int):
        self.base_url = f"http://127.0.0.1:{port}"
        self.log_path = folder / "label-studio.log"
        nowhere = "http://127.0.0.1:9"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            # A project's webhooks go to this machine, which 1.23.1 and later refuse unless told otherwise.
            "SSRF_PROTECTION_ENABLED": "false",
            # Nothing goes out: what would call home is off, and what nobody thought of meets a proxy that is not there.
            "COLLECT_ANALYTICS": "false",
            "LATEST_VERSION_CHECK": "false",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
            "FEATURE_FLAGS_OFFLINE": "true",
            "DISABLE_SIGNUP_WITHOUT_LINK": "true",
            "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "http_proxy": nowhere, "https_proxy": nowhere,
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }
        command = [
            os.environ["TIDEMILL_LABEL_STUDIO"], "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port),
            "--data-dir", folder / "data", "--username", OWNER, "--password", "correct-horse-1",
            "--user-token", TOKEN, "--enable-legacy-api-token", "--log-level", "WARNING",
        ]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder, env=environment,
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> "LabelStudio":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"Label Studio ended with {self.process.returncode}:\n{self.log()[-4000:]}"
            try:
                self.call("GET", "/api/current-user/whoami")
                return self
            except OSError:
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"Label Studio was not ready after {START_SECONDS} s:\n{self.log()[-4000:]}")

    def call(self, method: str, path: str, body=None):
        """The JSON of the answer; `None` where it has no body."""
        request = urllib.request.Request(
            self.base_url + path, method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=240) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read().decode(errors='replace')[:1000]}") from error
        return json.loads(text) if text else None

    def version(self) -> str:
        return self.call("GET", "/api/version")["release"]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def side(selected: str) -> dict:
    """What the page stores when an answer is clicked: `left` or `right`."""
    return {
        "id": "side", "type": "pairwise", "from_name": "comparison", "to_name": "comparison", "origin": "manual",
        "value": {"selected": selected},
    }


def verdict(choice: str) -> dict:
    """`tie` or `both_bad`."""
    return {
        "id": "verdict", "type": "choices", "from_name": "verdict", "to_name": "prompt", "origin": "manual",
        "value": {"choices": [choice]},
    }


def comment(text: str) -> dict:
    return {
        "id": "comment", "type": "textarea", "from_name": "comment", "to_name": "prompt", "origin": "manual",
        "value": {"text": [text]},
    }
