"""Shows that the model learns, from its own answers to what is served afterwards; `make demo` runs all.

    python tests/demos/run.py short|word|json|loop [--set FIELD=VALUE ...] [--folder DIR] [--threads N] [--page FILE]

TIDEMILL_BIN and TIDEMILL_TEST_MODEL name the binary and the default model's file. It ends with 1 when a target is missed. Interrupted, the
same command goes on; once it has ended, the same command begins anew. `--page` writes what was found into that page.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from loop import Loop, default_model, seconds

from document import machine, put

DEMOS = {"short": "short", "word": "word", "json": "valid_json", "loop": "flywheel"}


def setting(text: str):
    """FIELD=VALUE, where a value is JSON if it reads as JSON; `train.beta=0.2` is a field of a field."""
    name, _, value = text.partition("=")
    try:
        return name.split("."), json.loads(value)
    except ValueError:
        return name.split("."), value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    demo = importlib.import_module(DEMOS[options.demo])
    settings = demo.Settings()
    for (name, *inner), value in options.set:
        if not hasattr(settings, name):
            parser.error(f"{options.demo} has no setting {name}; it has {', '.join(vars(settings))}")
        setattr(settings, name, getattr(settings, name) | {inner[0]: value} if inner else value)

    # Its server ends with it, however it is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = options.folder or Path(".cache/demos") / options.demo
    done = folder / "done.json"
    if done.exists():
        shutil.rmtree(folder)
    loop = Loop(folder, options.threads)
    lines, targets = demo.run(loop, settings)
    verdicts = [f"- {'met' if met else '**missed**'}: {text}" for text, met in targets]
    told = ", ".join(f"{name} {json.dumps(value)}" for name, value in vars(settings).items())
    text = "\n".join([*lines, *verdicts, "", seconds(loop.costs)])
    print(f"\n{text}", flush=True)
    done.write_text(json.dumps({"settings": vars(settings), "targets": targets}))
    if options.page:
        about = f"{time.strftime('%Y-%m-%d', time.gmtime())}. {machine()}, {options.threads} threads. {default_model().name}. Settings: `{told}`."
        put(options.page, options.demo, f"{about}\n\n{text}\n")
    return 0 if all(met for _, met in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
