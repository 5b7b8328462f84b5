"""A PostgreSQL of a test's own, which it may stop and start."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from server import free_port


def binaries() -> Path:
    """The folder with initdb and postgres."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError("PostgreSQL's server is not here; install it (Debian: apt-get install postgresql)")


class Postgres:
    def __init__(self):
        self.bin = binaries()
        # PostgreSQL refuses to run as root, and a socket's path has at most 107 bytes.
        self.user = None
        self.home = Path(tempfile.mkdtemp(prefix="tidemill-pg-", dir="/tmp"))
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(self.home, self.user)
        self.port = free_port()
        self.url = f"postgres://tidemill@127.0.0.1:{self.port}/postgres"
        self.run("initdb", "-D", f"{self.home}/data", "-U", "tidemill", "--auth=trust", "--encoding=UTF8", "--locale=C")
        self.start()

    def run(self, tool: str, *arguments: str) -> str:
        command = [str(self.bin / tool), *arguments]
        if self.user:
            command = ["runuser", "-u", self.user, "--", *command]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp", timeout=180)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories='{self.home}'"
        # The server keeps what it inherits: its output must not hold a pipe of ours open.
        command = [str(self.bin / "pg_ctl"), "-D", f"{self.home}/data", "-l", f"{self.home}/log", "-w", "-t", "120", "-o", options, "start"]
        if self.user:
            command = ["runuser", "-u", self.user, "--", *command]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/tmp", check=True, timeout=180)

    def stop(self) -> None:
        """As a crash does it: connections break."""
        self.run("pg_ctl", "-D", f"{self.home}/data", "-m", "immediate", "-w", "stop")

    def query(self, sql: str) -> list[str]:
        out = self.run("psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tidemill", "-At", "-c", sql, "postgres")
        return out.splitlines()

    def close(self) -> None:
        try:
            self.stop()
        except AssertionError:
            pass
        shutil.rmtree(self.home, ignore_errors=True)
