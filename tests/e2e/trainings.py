"""What `tidemill train` left in a folder, and a training that is killed on the way."""

import subprocess
from collections.abc import Callable
from pathlib import Path


def content(folder: Path) -> dict[str, bytes]:
    names = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl", "lineage.json"]
    return {name: (folder / name).read_bytes() for name in names}


def steps(folder: Path) -> int:
    """The step of the newest checkpoint."""
    numbers = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return max(numbers, default=0)


def killed_until_it_ends(command: list[str], folder: Path, times: int, further: Callable[[int], int]) -> None:
    """Begins it again and again, and kills it once it has got on by as many steps as `further` says after so many kills, `times` at most."""
    killed = 0
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = steps(folder)
        while process.poll() is None and steps(folder) < before + further(killed):
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                pass
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
    assert process.returncode == 0 and killed >= 2, (process.returncode, killed)
