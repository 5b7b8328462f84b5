#!/usr/bin/env python3
"""Runs prompts through OpenVINO GenAI's continuous batching, in process, for `tidemill-loadtest compare`.

OpenVINO GenAI has no HTTP server of its own. This program is the least that can stand in for one: it keeps N requests in
the pipeline, adds the next when one ends, and notes when each token could be read. It pays for no HTTP, no JSON and no
detokenising, so its numbers flatter it a little.

The protocol is a JSON object per line. It prints {"ready": true, "version": ...}, then answers every task line
    {"streams": N, "max_tokens": N, "warmup": [prompt, ...], "prompts": [prompt, ...]}
with
    {"wall_s": s, "requests": [{"prompt_tokens": n, "completion_tokens": n, "ttft_ms": t, "gaps_ms": [...]}, ...]}
or {"error": text}, and ends when its input ends.
"""

import argparse
import json
import sys
import time

import openvino_genai as ov


class Request:
    """A request in the pipeline and the moments at which its tokens came out."""

    def __init__(self, pipeline, number: int, prompt, max_tokens: int):
        config = ov.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        self.prompt_tokens = prompt.shape[1]
        self.started = time.perf_counter()
        self.first = self.last = None
        self.gaps_ms: list[float] = []
        self.tokens = 0
        self.handle = pipeline.add_request(number, prompt, config)

    def poll(self) -> bool:
        """Reads what the last step produced; true when the answer is whole."""
        while self.handle.can_read():
            now = time.perf_counter()
            for output in self.handle.read().values():
                self.tokens += len(output.generated_ids)
            if self.first is None:
                self.first = now
            else:
                self.gaps_ms.append((now - self.last) * 1e3)
            self.last = now
        return self.handle.get_status() != ov.GenerationStatus.RUNNING

    def result(self) -> dict:
        if self.first is None:
            return {"error": f"no token; status {self.handle.get_status()}"}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "ttft_ms": (self.first - self.started) * 1e3,
            "gaps_ms": self.gaps_ms,
        }


class Harness:
    """The pipeline and a counter, because request ids must not repeat."""

    def __init__(self, model: str, threads: int, cache_gb: int):
        scheduler = ov.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
        self.pipeline = ov.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.tokenizer = self.pipeline.get_tokenizer()
        self.requests = 0

    def load(self, prompts: list[str], streams: int, max_tokens: int) -> tuple[float, list[dict]]:
        encoded = [self.tokenizer.encode(prompt).input_ids for prompt in prompts]
        waiting, running, results = list(reversed(encoded)), [], []
        started = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < streams:
                self.requests += 1
                running.append(Request(self.pipeline, self.requests, waiting.pop(), max_tokens))
            self.pipeline.step()
            ended = [request for request in running if request.poll()]
            if ended:
                results += [request.result() for request in ended]
                running = [request for request in running if request not in ended]
        return time.perf_counter() - started, results

    def task(self, task: dict) -> dict:
        if task["warmup"]:
            self.load(task["warmup"], task["streams"], task["max_tokens"])
        wall, requests = self.load(task["prompts"], task["streams"], task["max_tokens"])
        return {"wall_s": wall, "requests": requests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that optimum-cli exported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=int, default=2)
    args = parser.parse_args()

    def say(message: dict) -> None:
        print(json.dumps(message), flush=True)

    try:
        harness = Harness(args.model, args.threads, args.cache_gb)
    except Exception as error:  # whatever it is, the reader of the pipe must learn it
        say({"error": str(error)})
        sys.exit(1)
    say({"ready": True, "version": ov.__version__})
    for line in sys.stdin:
        try:
            say(harness.task(json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
