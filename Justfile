# One word per chore. `just` alone lists them.
default:
    @just --list

# the tests; arguments go to pytest
test *args:
    python -m pytest {{ args }}

# what must be clean before a commit
lint:
    ruff check .
    ruff format --check .
    mypy

# mend what can be mended by machine
fix:
    ruff check --fix .
    ruff format .

# speed of each task on the shipped recording; the last line of each is its real-time factor
bench:
    mkdir -p build/bench
    python -m moshi_cli codec roundtrip examples/audio/hello.wav -o build/bench/codec.wav
    python -m moshi_cli asr examples/audio/hello.wav -o build/bench/asr.txt
    python -m moshi_cli tts "hello" -o build/bench/tts.wav
    python -m moshi_cli chat -i examples/audio/hello.wav -o build/bench/chat.wav

# everything that must pass, from a fresh install on
ci:
    .ci/run
