#!/usr/bin/env bash
# Runs a command beside a fresh PostgreSQL: tests/postgres.sh COMMAND...
# The command finds the server's address, as a user who may make databases, in TIDEMILL_TEST_POSTGRES. The server listens on a
# free loopback port, keeps its data under .cache/postgres (CACHE moves that), and stops when the command ends.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: $0 COMMAND..." >&2; exit 2; }
cache=${CACHE:-$(cd "$(dirname "$0")/.." && pwd)/.cache}

find_server() {
    for folder in $(command -v initdb >/dev/null && dirname "$(readlink -f "$(command -v initdb)")") \
        $(ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql@*/bin 2>/dev/null | sort -rV); do
        [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ] && { echo "$folder"; return; }
    done
    return 1
}

if ! bin=$(find_server); then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql; } >&2
    fi
    bin=$(find_server) || { echo "$0: PostgreSQL's server is not here; install it (Debian: apt-get install postgresql)" >&2; exit 1; }
fi

# PostgreSQL refuses to run as root.
if [ "$(id -u)" = 0 ]; then
    user=$(id -u postgres >/dev/null 2>&1 && echo postgres || echo nobody)
    as() { runuser -u "$user" -- "$@"; }
else
    user=$(id -un)
    as() { "$@"; }
fi

mkdir -p "$cache/postgres"
home=$(mktemp -d "$cache/postgres/run.XXXXXX")
# A path through folders that the other user may not enter would stop it: then a folder of its own outside.
[ "$(id -u)" = 0 ] && chown "$user" "$home"
if ! as test -w "$home"; then
    rmdir "$home"
    home=$(as mktemp -d /tmp/tidemill-postgres.XXXXXX)
fi
# A socket's path has at most 107 bytes.
socket=$home
[ ${#socket} -lt 80 ] || socket=$(as mktemp -d /tmp/tidemill-socket.XXXXXX)

stop() {
    status=$?
    trap - EXIT
    [ -f "$home/data/postmaster.pid" ] && as "$bin/pg_ctl" -D "$home/data" -m immediate -w stop >/dev/null 2>&1
    rm -rf "$home" "$socket"
    exit $status
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

as "$bin/initdb" -D "$home/data" -U tidemill --auth=trust --encoding=UTF8 --locale=C --no-instructions >"$home/log" 2>&1 ||
    { cat "$home/log" >&2; exit 1; }
# Between asking for a free port and taking it another program may be faster: then the next one.
for _ in 1 2 3 4 5; do
    port=${TIDEMILL_TEST_POSTGRES_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
    started=
    as "$bin/pg_ctl" -D "$home/data" -l "$home/data/log" -w -t 120 start >/dev/null \
        -o "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories='$socket' -c max_connections=300" &&
        { started=yes; break; }
done
[ "$started" ] || { cat "$home/data/log" >&2; exit 1; }

export TIDEMILL_TEST_POSTGRES="postgres://tidemill@127.0.0.1:$port/postgres"
"$@"
