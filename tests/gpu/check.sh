#!/usr/bin/env bash
# Checks the first card of this machine with what `make gpu-build` left in a folder. Nothing is built or fetched. Whatever was measured when
# a limit is reached stands in the report. Usage: check.sh FOLDER REPORT [SECONDS]
set -uo pipefail
folder=$1 report=$2 limit=${3:-460}
here=$(cd "$(dirname "$0")" && pwd)
status=0

# The libraries of NVIDIA come with the toolkit, or with Python packages that nobody put on the loader's path.
packages=$(python3 -c 'import glob, site, sys
for folder in site.getsitepackages() + sys.path:
    print(*glob.glob(folder + "/nvidia/*/lib"), sep="\n")' 2>/dev/null | sort -u | paste -sd: -)
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}${LD_LIBRARY_PATH:+:}/usr/local/cuda/lib64:/usr/local/nvidia/lib64${packages:+:$packages}
export PATH=$PATH:/usr/local/cuda/bin

left() { echo $((limit > SECONDS ? limit - SECONDS : 0)); }
# `seconds most`: what is left, and no more than this.
seconds() { local left; left=$(left); echo $((left < $1 ? left : $1)); }
add() { tee -a "$report"; }

"$folder/card" check "$folder/images" "$report" "$(seconds 230)"
case $? in
    0) ;;
    2) exit 2 ;; # no card, and it has said so
    *) status=1 ;;
esac

ceiling() { sed -n "s/^| $1.* | \([0-9.]*\) |\$/\1$2/p" "$report" | head -1; }
copy=$(ceiling 'copy of blocks' e9) product=$(ceiling 'bf16 product' e12)
{
    printf '\n### Tokens per second, 8B Llama with random weights\n\n'
    printf '%s\n' '| server | batch | what | tokens/s | of the ceiling |' '|---|--:|---|--:|--:|'
} | add
work=
for place in /dev/shm "${TMPDIR:-/tmp}"; do
    free=$(df -k --output=avail "$place" 2>/dev/null | tail -1)
    if [ "${free:-0}" -gt 20000000 ]; then work=$(mktemp -d "$place/tidemill-gpu.XXXXXX") && break; fi
done
if [ -z "$work" ]; then
    echo '| Tidemill | | not measured: no 20 GB for the weights in /dev/shm or TMPDIR | | |' | add
    status=1
else
    trap 'rm -rf "$work"' EXIT
    most=$(seconds 130)
    timeout -k 5 "$most" "$folder/throughput" card "$folder/images" "$work" "${copy:-0}" "${product:-0}" $((most - 10)) | add
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "| Tidemill | | ended with status $code after at most $most s | | |" | add
        status=1
    fi
    rm -rf "$work"
fi

sanitize() {
    printf '\n### compute-sanitizer\n\n%s\n' '| tool | over | |' '|---|---|---|'
    if ! command -v compute-sanitizer >/dev/null; then
        echo '| | | not run: there is no compute-sanitizer on this machine |'
        return
    fi
    for tool in memcheck racecheck; do
        for part in 'parity rows' 'parity linears' 'parity attention' 'parity sampling'; do
            most=$(seconds 15)
            [ "$most" -gt 3 ] || { echo "| $tool | $part | not run: the limit was reached |"; continue; }
            timeout -k 5 "$most" compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$report.$tool" \
                "$folder/card" part "$folder/images" "$part" brief >/dev/null 2>&1
            case $? in
                0) verdict=clean ;;
                9) verdict="**$(tail -1 "$report.$tool" | sed 's/^=* *//')**" ;;
                124 | 137) verdict="nothing found in $most s" ;;
                *) verdict="did not run: $(tail -1 "$report.$tool" 2>/dev/null | sed 's/^=* *//')" ;;
            esac
            echo "| $tool | $part | $verdict |"
        done
    done
}
before=$(wc -l <"$report")
sanitize | add
tail -n "+$before" "$report" | grep -q '^| .*| \*\*.*\*\* |$' && status=1

{
    printf '\n### Beside transformers, counted in the same way\n\n'
    printf '%s\n' '| server | batch | what | tokens/s | |' '|---|--:|---|--:|---|'
} | add
most=$(left)
if [ "$most" -gt 20 ]; then
    timeout -k 5 "$most" python3 "$here/transformers_beside.py" | add
    [ "${PIPESTATUS[0]}" -eq 0 ] || echo '| transformers | | stopped at the limit | | |' | add
else
    echo '| transformers | | not run: the limit was reached | | |' | add
fi
echo "The table is in $report ($SECONDS s)."
exit $status
