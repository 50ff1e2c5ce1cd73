#!/usr/bin/env bash
# Fill the table that sparse prefill is published with: RULER from 4K to 128K tokens, and
# divergence from dense, of dense attention, KV sampling, FlexPrefill, MInference and XAttention.
# These runs have not been made: they need the hub and a GPU of 80 GB.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: scripts/published-ruler.sh [MODEL...]

Evaluates each model, a hub id or a folder (default: Llama-3.1-8B-Instruct and Qwen3-8B).
A run that was stopped goes on. Qwen3-8B reads more than 32K tokens only with YaRN: give a folder
whose config.json has the rope_parameters of its model card, or shorter LENGTHS.

environment:
  OUT       folder of the results (default: build/published)
  LENGTHS   prompt lengths (default: 4096,8192,16384,32768,65536,131072)
  TASKS     tasks of lm-eval (default: RULER's thirteen)
  LIMIT     samples per task and length (default: 100)
  PIECES    pieces of text per length for the divergence (default: 16)
  TEXTS     files to cut them from (default: text that ships here, too short for most lengths)
  TSA       the command (default: tsa)

example:
  LENGTHS=4096,32768 LIMIT=20 scripts/published-ruler.sh meta-llama/Llama-3.1-8B-Instruct
USAGE
}

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    usage
    exit 0
fi

niah=niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3
niah=$niah,niah_multiquery,niah_multivalue
TASKS=${TASKS:-$niah,ruler_vt,ruler_cwe,ruler_fwe,ruler_qa_hotpot,ruler_qa_squad}
LENGTHS=${LENGTHS:-4096,8192,16384,32768,65536,131072}
OUT=${OUT:-build/published}
TSA=${TSA:-tsa}
if [ $# -eq 0 ]; then set -- meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen3-8B; fi

configs=(
    --config 'samples-2048={"crossover": "off"}'
    --config 'samples-4096={"crossover": "off", "num_samples": 4096}'
    --config flexprefill
    --config minference
    --config xattention
)
texts=()
for text in ${TEXTS:-}; do texts+=(--text "$text"); done
for model in "$@"; do
    folder=$OUT/$(basename "$model")
    mkdir -p "$folder"
    # The dense replies come with every run, from the same samples.
    "$TSA" eval "$model" --tasks "$TASKS" --lengths "$LENGTHS" --limit "${LIMIT:-100}" \
        "${configs[@]}" --out "$folder/ruler.jsonl"
    "$TSA" fidelity "$model" --lengths "$LENGTHS" --pieces "${PIECES:-16}" \
        "${texts[@]}" "${configs[@]}" --out "$folder/fidelity.jsonl"
done
