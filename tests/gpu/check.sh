#!/usr/bin/env bash
# Checks the first card of this machine with what `make gpu-build` left in a folder. Nothing is built or fetched. Whatever fails is a row of the
# report that says why, and the rest goes on; whatever was measured when a limit is reached stands there. What programs complained is in
# REPORT.log. Usage: check.sh FOLDER REPORT [SECONDS]
# Exit status: 1 where something is wrong, 2 where there is no card, 3 where there is one that cannot be used, 4 where nothing is wrong but the
# limit was reached before all was done.
set -uo pipefail
folder=$1 report=$2 limit=${3:-460}
here=$(cd "$(dirname "$0")" && pwd)
log=$report.log errors=$report.errors
status=0
# Nothing worse is known.
unfinished() { [ "$status" -ne 0 ] || status=4; }
: >"$report" >"$log"

python=
for name in "${PYTHON:-python3}" python; do
    if command -v "$name" >/dev/null; then python=$name && break; fi
done

# The libraries of NVIDIA come with the toolkit, or with Python packages that nobody put on the loader's path. Only for our programs: torch has its
# own, and would take a toolkit's in their place.
packages=
if [ -n "$python" ]; then
    packages=$(timeout 30 "$python" -c 'import glob, site, sys
for folder in site.getsitepackages() + [site.getusersitepackages()] + sys.path:
    for kind in ("/nvidia/*/lib", "/torch/lib"):
        print(*glob.glob(folder + kind), sep="\n")' 2>/dev/null | awk 'NF && !seen[$0]++' | paste -sd: -)
fi
toolkits=$(ls -d /usr/local/cuda/lib64 /usr/local/cuda-*/lib64 /usr/local/nvidia/lib64 /usr/lib/wsl/lib 2>/dev/null | paste -sd: -)
libraries=${LD_LIBRARY_PATH:-}
for path in "$toolkits" "$packages"; do libraries=$libraries${path:+${libraries:+:}$path}; done
ours() { LD_LIBRARY_PATH=$libraries "$@"; }
# What a program says last is its reason, and not where it stood.
export PATH=$PATH:/usr/local/cuda/bin RUST_BACKTRACE=0

left() { echo $((limit > SECONDS ? limit - SECONDS : 0)); }
# `seconds most keep`: what is left when so many seconds are kept for what is behind, and no more than this.
seconds() { local left; left=$(($(left) - ${2:-0})); echo $((left < 0 ? 0 : left < $1 ? left : $1)); }
# What the last two parts have in any case.
BESIDE=65 SANITIZE=45
command -v compute-sanitizer >/dev/null || SANITIZE=0
add() { tee -a "$report"; }
# What a program complained last, as words of a row.
words() { tail -n 3 "$errors" 2>/dev/null | tr '\n|' ' /' | cut -c 1-400; }
# Keeps what a program complained.
keep() { tee -a "$log" <"$errors" >&2; }

# A program of another processor or a newer glibc says so itself, and nothing of ours runs then.
if ! ours timeout -k 5 30 "$folder/card" part - machine >/dev/null 2>"$errors"; then
    keep
    {
        printf '### The machine\n\n| what | |\n|---|---|\n'
        echo "| our programs | do not start: $(words) |"
        echo "| system | $(uname -srm), $(getconf GNU_LIBC_VERSION 2>&1) |"
    } | add
    status=3
else
    # Its own limit comes first.
    most=$(seconds 240 $((80 + 55 + BESIDE + SANITIZE)))
    ours timeout -k 5 "$((most + 15))" "$folder/card" check "$folder/images" "$report" "$most" 2> >(tee -a "$log" >&2)
    code=$?
    case $code in
        0) ;;
        2) # No card, and it has said so; perhaps this knows why.
            command -v nvidia-smi >/dev/null && timeout -k 5 20 nvidia-smi
            exit 2
            ;;
        3 | 4) status=$code ;;
        124 | 137)
            echo "| the check | stopped: it did not end by itself in $((most + 15)) s |" | add
            status=1
            ;;
        *) status=1 ;;
    esac
fi
if command -v nvidia-smi >/dev/null; then
    fields=name,driver_version,memory.used,memory.total,compute_mode,mig.mode.current,ecc.mode.current,pcie.link.gen.current
    fields+=,pcie.link.width.current,clocks.sm,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active
    { printf '\n```\n' && timeout -k 5 20 nvidia-smi --query-gpu="$fields" --format=csv 2>&1 && printf '```\n'; } | add
fi

# Layers of the model that is measured: all 32 of an 8B Llama where disk and card hold them (a layer is 440 MB, and with its keys and values 1.1 GB
# of the card; the embedding and the head are 2.1 GB).
layers=0 work=
card=$(sed -n 's/^| free and all of its memory | (\([0-9]*\),.*/\1/p' "$report" | head -1)
memory=$(awk '/MemAvailable/ { print $2 }' /proc/meminfo)
for place in /dev/shm "${TMPDIR:-/tmp}"; do
    free=$(df -k --output=avail "$place" 2>/dev/null | tail -1)
    # What lies in the machine's memory is there twice while it is read.
    if [ "$place" = /dev/shm ] && [ "${free:-0}" -gt $((memory / 2)) ]; then free=$((memory / 2)); fi
    fits=$(((${free:-0} / 1000 - 3000) / 440)) holds=$(((${card:-0} / 1000000 - 5000) / 1100))
    fits=$((fits < holds ? fits : holds))
    fits=$((fits < 32 ? fits : 32))
    if [ "$fits" -gt "$layers" ]; then layers=$fits work=$place; fi
done
name='an 8B Llama'
[ "$layers" -lt 32 ] && [ "$layers" -gt 0 ] && name="$layers of the 32 layers of an 8B Llama"

ceiling() { sed -n "s/^| $1.* | \([0-9.]*\) |\$/\1$2/p" "$report" | head -1; }
copy=$(ceiling 'copy of blocks' e9) product=$(ceiling 'bf16 product' e12)
{
    printf '\n### Tokens per second, %s with random weights\n\n' "$name"
    printf '%s\n' '| server | batch | what | tokens/s | of the ceiling |' '|---|--:|---|--:|--:|'
} | add
if [ "$status" -eq 3 ]; then
    echo '| Tidemill | | not measured: the card does not open | | |' | add
elif [ "$layers" -lt 2 ]; then
    echo '| Tidemill | | not measured: no room for two layers of weights in /dev/shm or TMPDIR, or on the card | | |' | add
    status=1
else
    work=$(mktemp -d "$work/tidemill-gpu.XXXXXX")
    # Up to 18 GB, of memory.
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    for format in bf16:80 fp8:55; do
        most=$(seconds "${format#*:}" $((BESIDE + SANITIZE)))
        # 0 would be no limit at all.
        if [ "$most" -le 20 ]; then
            echo "| Tidemill, ${format%:*} | | not run: the limit was reached | | |" | add
            unfinished
            continue
        fi
        ours timeout --foreground -k 5 "$most" "$folder/throughput" card "$folder/images" "$work" "$layers" "${format%:*}" "${copy:-0}" "${product:-0}" \
            $((most - 10)) 2>"$errors" | add
        code=${PIPESTATUS[0]}
        keep
        case $code in
            0) ;;
            4) unfinished ;;
            *)
                echo "| Tidemill, ${format%:*} | | ended with status $code after at most $most s: $(words) | | |" | add
                status=1
                ;;
        esac
    done
    rm -rf "$work"
fi

{
    printf '\n### Beside transformers, counted in the same way\n\n'
    printf '%s\n' '| server | batch | what | tokens/s | |' '|---|--:|---|--:|---|'
} | add
most=$(seconds 110 $SANITIZE)
if [ "$most" -le 20 ]; then
    echo '| transformers | | not run: the limit was reached | | |' | add
    unfinished
elif [ -z "$python" ]; then
    echo '| transformers | | not compared: there is no Python | | |' | add
else
    # Of torch's own libraries.
    timeout --foreground -k 5 "$most" "$python" "$here/transformers_beside.py" --layers $((layers > 0 ? layers : 32)) 2>"$errors" | add
    code=${PIPESTATUS[0]}
    keep
    case $code in
        0) ;;
        124 | 137)
            echo "| transformers | | stopped after $most s | | |" | add
            unfinished
            ;;
        *) echo "| transformers | | ended with status $code: $(words) | | |" | add ;;
    esac
fi

sanitize() {
    printf '\n### compute-sanitizer\n\n| tool | over | |\n|---|---|---|\n'
    if [ "$status" -eq 3 ]; then
        echo '| | | not run: the card does not open |'
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        echo '| | | not run: there is no compute-sanitizer on this machine |'
        return
    fi
    # Each has an equal share of what is left, so that a slow one costs none of those behind it; what it leaves is theirs.
    parts=('parity rows' 'parity linears' 'parity attention' 'parity attention wgmma' 'parity fp8' 'parity fp8 activations' 'parity low-rank'
        'parity experts' 'parity sampling' 'parity training')
    runs=$((2 * ${#parts[@]}))
    for tool in memcheck racecheck; do
        for part in "${parts[@]}"; do
            share=$(($(left) / runs)) runs=$((runs - 1))
            # A program needs some seconds to begin: few runs are better than none that comes to anything.
            most=$(seconds $((share < 8 ? 8 : share > 20 ? 20 : share)))
            [ "$most" -gt 3 ] || { echo "| $tool | $part | not run: the limit was reached |"; continue; }
            rm -f "$report.$tool"
            # What a library asks of the driver and is refused is no error of ours.
            options=()
            [ "$tool" = memcheck ] && options=(--report-api-errors no)
            ours timeout -k 5 "$most" compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 9 --log-file "$report.$tool" \
                "$folder/card" part "$folder/images" "$part" brief >/dev/null 2>"$errors"
            case $? in
                0) verdict=clean ;;
                9) verdict="**$(grep -m 1 -E 'Error|Invalid|Race|Uninitialized|Program hit' "$report.$tool" | sed 's/^=* *//'), $(tail -1 "$report.$tool" | sed 's/^=* *//')**" ;;
                124 | 137) verdict="nothing found in $most s" ;;
                *) verdict="did not run: $(words) $(tail -1 "$report.$tool" 2>/dev/null | sed 's/^=* *//')" ;;
            esac
            cat "$report.$tool" >>"$log" 2>/dev/null
            echo "| $tool | $part | $verdict |"
        done
    done
}
before=$(wc -l <"$report")
sanitize | add
sanitized() { tail -n "+$before" "$report"; }
if sanitized | grep -q '^| .*| \*\*.*\*\* |$'; then
    [ "$status" -eq 3 ] || status=1
elif sanitized | grep -q 'the limit was reached |$'; then
    unfinished
fi
rm -f "$errors"
echo "The table is in $report, what programs complained in $log ($SECONDS s)."
exit $status
