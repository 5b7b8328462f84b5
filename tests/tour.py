"""Types what a page says, in an empty folder, and writes what came of it into the page.

    python tests/tour.py BINARY PAGE [--folder DIR]

A block of ```console has commands (`$ …`, with their further lines) and what they print. `head=N` and `tail=N` behind `console` keep so many
lines of an output. `<!-- picture FILE PATH -->` takes a picture of the server's page beside the document. A command that fails ends it,
and the page stays as it was.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```console(?P<options>[^\n]*)\n(?P<body>.*?)```|<!-- picture (?P<file>\S+) (?P<path>\S+) -->", re.DOTALL)
WIDTH = 200
# The shell in which everything is typed. `make serve` runs in the background, since there is one shell only.
SHELL = """
make() {
    [ "$*" = serve ] || { echo "make $*: not in the tour"; return 1; }
    target/release/tidemill pull --data data > /dev/null && { target/release/tidemill serve --data data > served.txt 2> log.txt & } && SERVER=$!
    for _ in $(seq 300); do grep -qs 'Ready at' served.txt && break; kill -0 $SERVER || { cat log.txt; return 1; }; sleep 0.2; done
    cat served.txt
}
# Of what the tour has begun, not of the server.
wait() { for job in $(jobs -p); do [ "$job" = "$SERVER" ] || builtin wait "$job"; done; }
"""
END = "end of the output of"


class Shell:
    def __init__(self, folder: Path):
        self.bash = subprocess.Popen(
            ["bash"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        self.bash.stdin.write(SHELL)

    def run(self, command: str) -> str:
        """What a command prints."""
        print(f"$ {command}", flush=True)
        # Grouped on lines of their own: a command may end with `&` or a here document.
        self.bash.stdin.write(f"{{ {command}\n}} 2>&1 < /dev/null\necho \"{END} $?\"\n")
        self.bash.stdin.flush()
        lines = []
        for line in self.bash.stdout:
            if END in line:
                # The output before it may lack its last line's end.
                line, _, status = line.rpartition(END)
                lines += [line] if line else []
                if int(status):
                    sys.exit(f"{''.join(lines)}\n`{command}` ended with {int(status)}")
                return "".join(lines)
            print(line, end="", flush=True)
            lines.append(line)
        sys.exit(f"the shell ended in `{command}`")

    def close(self) -> None:
        os.killpg(self.bash.pid, signal.SIGTERM)
        self.bash.wait()


def commands(body: str) -> list[str]:
    """Those of a block, each with its further lines: a quotation that is open, or a backslash at the end, goes on."""
    found, open_ = [], False
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif open_:
            found[-1] += f"\n{line}"
        else:
            continue
        open_ = found[-1].count("'") % 2 == 1 or found[-1].endswith("\\")
    return found


def shown(output: str, options: str, folder: Path) -> str:
    """As much of an output as a page has room for; `folder` is where everybody is."""
    # What rewrites its line has only its last state.
    lines = [line.rstrip().split("\r")[-1] for line in output.replace(str(folder), ".").strip("\n").split("\n")]
    lines = [line if len(line) <= WIDTH else f"{line[:WIDTH].rstrip()} …" for line in lines]
    head, tail = (int(found[1]) if (found := re.search(rf"{word}=(\d+)", options)) else 0 for word in ("head", "tail"))
    if (head or tail) and len(lines) > head + tail + 1:
        lines = [*lines[:head], "…", *lines[len(lines) - tail :]]
    return "\n".join(lines)


def picture(path: str, to: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000", "--window-size=1280,1500"]
    subprocess.run(["chromium", *flags, f"--screenshot={to}", f"http://127.0.0.1:8080{path}"], check=True, capture_output=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/tour")
    options = parser.parse_args()

    folder, pictures = options.folder.resolve(), {}
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "target/release").mkdir(parents=True)
    (folder / "target/release/tidemill").symlink_to(options.binary.resolve())
    for name in ("docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shell = Shell(folder)

    def typed(block: re.Match) -> str:
        if block["file"]:
            pictures[block["file"]] = folder / block["file"]
            picture(block["path"], pictures[block["file"]])
            return block[0]
        parts = []
        for command in commands(block["body"]):
            output = shown(shell.run(command), block["options"], folder)
            parts += [f"$ {command}", *([output] if output else [])]
        return f"```console{block['options']}\n" + "\n".join(parts) + "\n```"

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        text = BLOCK.sub(typed, options.page.read_text(encoding="utf-8"))
    finally:
        shell.close()
    options.page.write_text(text, encoding="utf-8")
    for name, made in pictures.items():
        shutil.copy(made, options.page.with_name(name))


if __name__ == "__main__":
    main()
