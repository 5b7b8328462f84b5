"""What programs that measure write into a page of docs/: the machine, and a part of it between two markers."""

import os
import platform
from pathlib import Path


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())


def machine() -> str:
    return f"{processor()}, {os.cpu_count()} cores"


def put(page: Path, part: str, text: str) -> None:
    """Replaces what stands between `<!-- PART:begin -->` and `<!-- PART:end -->`."""
    begin, end = (f"<!-- {part}:{edge} -->" for edge in ("begin", "end"))
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")
