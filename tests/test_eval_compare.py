"""Pairs of recordings through `moshi eval codec`: no model, and distances known beforehand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Invoke, invoke
from torch import Tensor

from moshi_cli.core import audio

__all__ = ["invoke"]  # a fixture

TIME = torch.arange(24_000, dtype=torch.float64) / 24_000
TONE = (torch.sin(2 * math.pi * 1000 * TIME) * 0.5).float()
OTHER = (torch.cos(2 * math.pi * 1000 * TIME) * 0.5).float()  # orthogonal to it, as strong
START = ("eval", "codec", "-m", "nowhere")


def save(name: str, wav: Tensor) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    audio.write(name, wav, subtype="float")


@pytest.fixture
def folders(invoke: Invoke) -> Invoke:
    """Two folders: 20 dB and 40 dB below the tone there is something else."""
    save("good/a.wav", TONE)
    save("good/deep/b.wav", TONE)
    save("bad/a.wav", TONE + 0.1 * OTHER)
    save("bad/deep/b.wav", TONE + 0.01 * OTHER)
    return invoke


def told(done: Any) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_two_folders(folders: Invoke) -> None:
    save("bad/more.wav", TONE)
    args = (*START, "good", "-r", "--degraded", "bad", "--metrics", "sisdr,snr,mel", "--json")
    done = folders(*args, "-o", "out", "--html", "page.html")
    record = told(done)
    figures = record["figures"]
    assert figures["si_sdr_db"]["value"] == pytest.approx(30, abs=1e-2)
    assert figures["si_sdr_db"]["count"] == 2 and set(figures) == {"si_sdr_db", "snr_db", "mel_db"}
    assert "bad: without a reference: more" in done.stderr
    assert record["context"]["model"] == "pairs" and "codec" not in record["context"]
    a, b = map(json.loads, Path("out/items.jsonl").read_text().splitlines())
    assert a["passes"]["degraded"]["si_sdr_db"] == pytest.approx(20, abs=1e-2)
    assert b["passes"]["degraded"]["si_sdr_db"] == pytest.approx(40, abs=1e-2)
    assert (b["audio"], b["passes"]["degraded"]["audio"]) == (
        "../good/deep/b.wav", "../bad/deep/b.wav",
    )  # fmt: skip
    save("bad/a.wav", TONE + 0.01 * OTHER)
    done = folders(*args, "-o", "out", "--resume")
    assert "1 ok, 1 skipped" in done.stderr
    assert told(done)["figures"]["si_sdr_db"]["value"] == pytest.approx(40, abs=1e-2)


def test_pairs_of_a_manifest(folders: Invoke) -> None:
    rows = [
        {"id": "one", "path": "good/a.wav", "degraded": "bad/a.wav", "text": "go left"},
        {"id": "two", "path": "good/deep/b.wav", "degraded": "bad/deep/b.wav", "start": 0.5},
        {"id": "three", "path": "good/a.wav"},
    ]
    save("bad/deep/b.wav", (TONE + 0.01 * OTHER)[12_000:])
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = f"command:{sys.executable} -c \"import sys; print('go')\" {{input}}"
    args = (*START, "--manifest", "m.jsonl", "--metrics", "sisdr", "--json", "-o", "out")
    done = folders(*args, "--judge", judge)
    assert done.exit_code == 3
    record = json.loads(done.stdout)
    assert record["failed"] == ["three"] and "no degraded recording of it" in done.stderr
    figures = record["figures"]
    assert figures["si_sdr_db"]["value"] == pytest.approx(30, abs=1e-2)
    assert figures["original_wer"]["value"] == 0.5 and figures["wer_added"]["value"] == 0
    row = json.loads(Path("out/items.jsonl").read_text().splitlines()[1])
    assert audio.duration_s(Path("out") / row["audio"]) == 0.5  # the part alone


def test_lengths_may_differ_by_a_little(folders: Invoke) -> None:
    save("bad/a.wav", torch.cat([TONE + 0.1 * OTHER, torch.ones(1000)]))
    args = (*START, "good", "--degraded", "bad", "--metrics", "sisdr", "--json", "-o", "out")
    figures = told(folders(*args))["figures"]
    assert figures["si_sdr_db"]["value"] == pytest.approx(20, abs=1e-2)
    assert json.loads(Path("out/items.jsonl").read_text())["longer_s"] == pytest.approx(1 / 24)
    save("bad/a.wav", TONE[:12_000])
    done = folders(*args)
    assert done.exit_code == 1
    assert "bad/a.wav has 0.50 s, its reference 1.00 s: they do not belong" in done.stderr


def test_what_makes_no_pair(folders: Invoke) -> None:
    audio.write("bad/a.flac", TONE)
    done = folders(*START, "good", "--degraded", "bad")
    assert done.exit_code == 1 and "bad has a.flac, a.wav: which one is it?" in done.stderr
    for more, said in (
        (("--degraded", "nowhere"), "is no folder"),
        (("--degraded", "bad", "-n", "8"), "--num-codebooks is of our codec"),
        (("--degraded", "bad", "--metrics", "mos"), "unknown measure"),
    ):
        done = folders(*START, "good", *more)
        assert done.exit_code == 2 and said in done.stderr and not done.stdout


def test_pairs_in_a_suite(folders: Invoke) -> None:
    text = "{name: other, task: codec, inputs: good, options: {degraded: bad, metrics: sisdr}}"
    Path("set").mkdir()
    for name in ("good", "bad"):
        Path(name).rename(f"set/{name}")
    Path("set/s.yaml").write_text(f"entries:\n- {text}\n")
    done = folders("eval", "suite", "set/s.yaml", "-m", "nowhere", "--json")
    found = told(done)["entries"][0]["result"]["figures"]["si_sdr_db"]["value"]
    assert found == pytest.approx(20, abs=1e-2)
