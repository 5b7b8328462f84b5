"""What README.md and docs/tour.md have people type: the program that stands for people, and how pages are typed and written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from judging import rows
from server import Server, default_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tour import BLOCK, commands, shown  # noqa: E402

PEOPLE = ROOT / "docs/examples/people.py"
PAGES = [ROOT / "README.md", ROOT / "docs/tour.md"]


def people(server: Server, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, PEOPLE, "--url", f"http://127.0.0.1:{server.port}/v1", "--model", "base", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_people_compare_and_ask(tmp_path):
    server = Server(tmp_path, {"base": default_model()}, "--threads", "2").wait_ready()
    try:
        compared = people(server, "compare", "--questions", "6", "--max-tokens", "64")
        assert compared.returncode == 0, compared.stderr
        count = int(re.fullmatch(r"6 questions; (\d) comparisons by \d people\n", compared.stdout)[1])
        asked = people(server, "ask", "--people", "5", "--max-tokens", "16")
        assert asked.returncode == 0, asked.stderr
        assert re.fullmatch(r"base answered 5 people; \d+% liked it\n", asked.stdout), asked.stdout
        wrong = people(server, "ask", "--people", "1", "--model", "none")
        assert wrong.returncode == 1 and "answered 404" in wrong.stderr
    finally:
        server.stop()
    kinds = [row["kind"] for row in rows(server.data, "SELECT kind FROM feedback ORDER BY kind")]
    assert kinds == ["comparison"] * count + ["thumb"] * 5


def test_without_a_server_people_say_what_to_start():
    nobody = subprocess.run([sys.executable, PEOPLE, "ask", "--url", "http://127.0.0.1:9/v1"], capture_output=True, text=True, timeout=60)
    assert nobody.returncode == 1 and "make serve" in nobody.stderr and "Traceback" not in nobody.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_commands_are_found_and_its_files_exist(page):
    text = page.read_text(encoding="utf-8")
    blocks = [block for block in BLOCK.finditer(text) if block["body"]]
    typed = [command for block in blocks for command in commands(block["body"])]
    assert typed[0] == "make serve" and len(typed) == len(re.findall(r"^\$ ", text, re.MULTILINE))
    for name in re.findall(r"\b(?:docs|tests)/\S+\.\w+", " ".join(typed)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#:]+)", text):
        assert (page.parent / name).exists(), f"{page.name} leads to {name}"


def test_outputs_are_cut_and_name_no_folder_of_this_machine():
    text = "10%\r20%\n" + "\n".join(map(str, range(9))) + "\nin /x/y/data\n"
    assert shown(text, " head=2 tail=1", Path("/x/y")) == "20%\n0\n…\nin ./data"
    assert shown("a\nb\n", " head=1 tail=1", Path("/x")) == "a\nb"
    assert commands("$ curl '{\n  1}' \\\n  -s\nanswer\n$ second\n") == ["curl '{\n  1}' \\\n  -s", "second"]
