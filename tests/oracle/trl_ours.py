"""What `transformers` + PEFT compute with an adapter that Tidemill trained and wrote.

    python trl_ours.py MODEL.gguf GOLDENS/trl FOLDER

FOLDER is below GOLDENS/trl and holds adapter_config.json and adapter_model.safetensors; expected.json is written beside them.
"""

import sys
from pathlib import Path

from recorded import write_json
from trl_curves import HELD_OUT, expected
from trl_training import read_rows


def main() -> None:
    path, goldens, folder = map(Path, sys.argv[1:4])
    row = read_rows(goldens / "rows.jsonl")[-HELD_OUT]
    write_json(folder / "expected.json", expected(path, folder, row))


if __name__ == "__main__":
    main()
