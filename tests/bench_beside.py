"""What a fine-tuning job costs those who are served beside it; rewrites a part of docs/benchmarks.md.

    python tests/bench_beside.py TIDEMILL LOADTEST MODEL.gguf [--rounds N] [--streams 1,4,16] [--requests N] [--priority idle|low]

One server, one DPO job. Each round measures each load with the job paused and then with the job at work, so that what else the machine
does falls on both alike. Only the standard library is used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from document import machine, put

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/benchmarks.md"
PATIENCE = 300


class Server:
    """The API of one server."""

    def __init__(self, port: int):
        self.base = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> dict:
        request = urllib.request.Request(self.base + path, body, {"Content-Type": kind}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def ready(self) -> bool:
        try:
            self.ask("GET", "/ready")
            return True
        except (urllib.error.URLError, ValueError):
            return False

    def upload(self, lines: bytes) -> str:
        edge = "rows-of-a-benchmark"
        head = f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{edge}\r\n'
        head += 'Content-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
        return self.ask("POST", "/v1/files", head.encode() + lines + f"\r\n--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}")["id"]


def wait(what: str, condition) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"waited in vain for {what}")
        time.sleep(0.2)


def rows(count: int) -> bytes:
    made = subprocess.run([sys.executable, ROOT / "tests/oracle/trl_rows.py", "long", str(count), "7"], stdout=subprocess.PIPE, check=True)
    lines = []
    for row in map(json.loads, made.stdout.splitlines()):
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        said = lambda answer: answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        lines.append({"input": {"messages": prompt}, "preferred_output": said(row["chosen"]), "non_preferred_output": said(row["rejected"])})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def processor_seconds(server: int) -> float:
    """Of the server's children: the job."""
    spent = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == server:
            spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def measure(options, server: Server, pid: int, job: str) -> dict[tuple[int, bool], list[dict]]:
    path = f"/v1/fine_tuning/jobs/{job}"
    at_work = lambda: server.ask("GET", path)["status"] == "running"
    results: dict[tuple[int, bool], list[dict]] = {}
    wait("the first step", lambda: any(event["type"] == "metrics" for event in server.ask("GET", f"{path}/events?limit=20")["data"]))
    for _ in range(options.rounds):
        for streams in map(int, options.streams.split(",")):
            for beside in (False, True):
                server.ask("POST", f"{path}/{'resume' if beside else 'pause'}")
                if beside:
                    # Its first steps come after the model is read again.
                    wait("the job", at_work)
                    before = processor_seconds(pid)
                    wait("the job's computing", lambda: processor_seconds(pid) > before + 3)
                else:
                    wait("the pause", lambda: not at_work() and processor_seconds(pid) == 0)
                before = processor_seconds(pid)
                command = [options.loadtest, "run", "--base-url", f"{server.base}/v1", "-m", "bench", "-c", str(streams), "--json"]
                command += ["-n", str(options.requests * max(1, streams // 2)), "--ignore-eos"]
                found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
                if beside and not at_work():
                    sys.exit("the job ended before the measurement did; give it more rows")
                found["job_cpu_share"] = (processor_seconds(pid) - before) / found["wall_s"]
                results.setdefault((streams, beside), []).append(found)
                print(streams, "beside a job" if beside else "alone", json.dumps(found), flush=True)
    server.ask("POST", f"{path}/cancel")
    return results


def document(options, results: dict[tuple[int, bool], list[dict]]) -> str:
    median = lambda found, *keys: statistics.median(value(result, *keys) for result in found)
    lines = [
        f"{time.strftime('%Y-%m-%d')}. {machine()}. SmolLM2-135M-Instruct (Q4_1) served with its defaults, 128 tokens in, 64 out; "
        f"a DPO job on the same model. Medians of {options.rounds} rounds; priority of the job `{options.priority}`. Alone → beside the job.",
        "",
        "| streams | first token p50, ms | first token p99, ms | × | between tokens p50, ms | p99, ms | × | output tok/s | the job's share of the cores |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for streams in map(int, options.streams.split(",")):
        alone, beside = results[streams, False], results[streams, True]
        cells = []
        for keys in [("ttft_ms", "p50"), ("ttft_ms", "p99"), ("inter_token_ms", "p50"), ("inter_token_ms", "p99")]:
            before, after = median(alone, *keys), median(beside, *keys)
            cells.append(f"{before:.1f} → {after:.1f}")
            if keys[1] == "p99":
                cells.append(f"{after / before:.2f}")
        pace = f"{median(alone, 'output_tok_s'):.0f} → {median(beside, 'output_tok_s'):.0f}"
        share = median(beside, "job_cpu_share") / os.cpu_count()
        lines.append(f"| {streams} | {' | '.join(cells)} | {pace} | {share:.0%} |")
    return "\n".join([*lines, ""])


def value(result: dict, *keys: str) -> float:
    for key in keys:
        result = result[key]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tidemill")
    parser.add_argument("loadtest")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--priority", default="idle")
    parser.add_argument("--port", type=int, default=18950)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = open(Path(folder) / "log", "w+")
        command = [options.tidemill, "serve", "--model", f"bench={os.path.abspath(options.model)}", "--port", str(options.port)]
        command += ["--training-priority", options.priority]
        process = subprocess.Popen([*command, "--data", f"{folder}/data"], stdout=log, stderr=log)
        server = Server(options.port)
        try:
            wait("the server", lambda: server.ready() or process.poll() is not None)
            if process.poll() is not None:
                log.seek(0)
                sys.exit(log.read())
            numbers = {"n_epochs": 50, "batch_size": 4}
            body = {"model": "bench", "training_file": server.upload(rows(400)), "method": {"type": "dpo", "dpo": {"hyperparameters": numbers}}}
            job = server.ask("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode())["id"]
            results = measure(options, server, process.pid, job)
        finally:
            process.terminate()
            process.wait(timeout=60)
    put(DOCUMENT, "beside", document(options, results))


if __name__ == "__main__":
    main()
