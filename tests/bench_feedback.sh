#!/usr/bin/env bash
# Feedback through HTTP on a fresh SQLite: tests/bench_feedback.sh TIDEMILL MODEL.gguf [ROUNDS]. Prints one JSON line per load and round.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 TIDEMILL MODEL.gguf [ROUNDS]" >&2; exit 2; }
bin=$1 model=$2 rounds=${3:-3}
loadtest=$(dirname "$bin")/tidemill-loadtest
[ -x "$loadtest" ] || ${CARGO:-cargo} build --release --locked -p tidemill-loadtest
port=${BENCH_PORT:-18900}
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; rm -rf "$folder"' EXIT

"$bin" serve --model "bench=$model" --port "$port" --data "$folder/data" --kv-memory 256MiB >"$folder/log" 2>&1 &
server=$!
for _ in $(seq 200); do
    curl -fs "http://127.0.0.1:$port/ready" >/dev/null 2>&1 && break
    kill -0 "$server" 2>/dev/null || { cat "$folder/log" >&2; exit 1; }
    sleep 0.1
done
for round in $(seq "$rounds"); do
    for load in "1 1" "16 1" "64 1" "4 100"; do
        read -r connections batch <<<"$load"
        "$loadtest" feedback --base-url "http://127.0.0.1:$port/v1" -m bench -c "$connections" --batch "$batch" --duration 5 --json |
            tr -d '\n' | tr -s ' ' && echo
    done
done
