"""`moshi bench`: clocks, percentiles, ratios and what is counted, on fakes and tiny models."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli import bench_jobs, bench_latency, devices
from moshi_cli.core import errors
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.weights import load_mimi
from moshi_cli.tasks import machine, pit, shapes
from moshi_cli.tasks.contest import Job, Worker, agreement, compare
from moshi_cli.tasks.stopwatch import Clock, Lap, laps, percentile, summary

TINY = ModelConfig(mimi=TINY_MIMI, lm=TINY_LM, lags={"chat": 0.0, "asr": 0.16, "tts": -0.16})
STT = ModelConfig(
    mimi=TINY_MIMI, kind="stt", lags={"asr": 0.16},
    lm=replace(TINY_LM, depth=None, n_q=4, dep_q=0, delays=(0,) * 5),
)  # fmt: skip


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0
        self.slept: list[float] = []

    def pass_by(self, wall: float, cpu: float = 0.0) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.wall += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.cpu, self.sleep)


# Clocks -------------------------------------------------------------------------------------------


def test_burst_times_every_step() -> None:
    time = Time()
    lengths = iter([(0.010, 0.008), (0.030, 0.020)])
    done = laps(lambda: time.pass_by(*next(lengths)), 2, clock=time.clock)
    assert [round(lap.wall_ms, 6) for lap in done] == [10, 30]
    assert [round(lap.cpu_ms, 6) for lap in done] == [8, 20]
    assert not time.slept and [lap.behind_ms for lap in done] == [0, 0]


def test_paced_waits_for_the_sound_and_counts_what_is_late() -> None:
    """Frames come at 0, 80, 160 and 240 ms; the second takes 200 ms and makes the third late."""
    time = Time()
    lengths = iter([0.050, 0.200, 0.010, 0.010])
    done = laps(lambda: time.pass_by(next(lengths)), 4, pace_s=0.08, clock=time.clock)
    assert time.slept == [0.03]  # until 80 ms; later nothing is early
    assert [round(lap.behind_ms, 6) for lap in done] == [50, 200, 130, 60]
    found = summary(done, audio_s=0.08, pace_s=0.08)
    assert found["late"] == 2 and found["behind_max_ms"] == 200


def test_percentiles_are_linear_between_ranks() -> None:
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert percentile(values, 50) == 30
    assert percentile(values, 90) == pytest.approx(46)
    assert percentile(values, 99) == pytest.approx(49.6)


def test_summary_by_hand() -> None:
    done = [Lap(ms, ms / 2, parts={"encode": ms / 10}) for ms in (10.0, 20.0, 30.0, 40.0, 50.0)]
    found = summary(done, audio_s=0.08, batch=4)
    assert found["p50_ms"] == 30 and found["p90_ms"] == 46 and found["max_ms"] == 50
    assert found["cpu_ms"] == 15
    assert found["rtf"] == pytest.approx(0.375)  # 30 ms for 80 ms of sound
    assert found["streams"] == pytest.approx(4 * 80 / 30, abs=1e-3)
    assert found["encode_p50_ms"] == 3 and "late" not in found


def test_peak_is_at_least_what_is_used() -> None:
    before = machine.peak_mb()
    block = np.ones(8_000_000)  # 64 MB
    assert machine.peak_mb() >= machine.memory_mb() >= block.nbytes / 1e6
    assert machine.peak_mb() >= before > 10
    assert machine.bandwidth_gb_s("cpu", copied_mb=8) > 0.01


# Side by side -------------------------------------------------------------------------------------


class Runner:
    """A candidate whose steps take as long as it says, and who writes down its turns."""

    def __init__(self, name: str, ms: Mapping[str, float], turns: list[str]) -> None:
        self.name, self.ms, self.turns = name, ms, turns

    def outputs(self) -> Mapping[str, Any]:
        return {}

    def laps(self, lane: str, steps: int, pace_s: float | None = None) -> list[Lap]:
        self.turns.append(f"{self.name} {lane} {steps}")
        return [Lap(2 * self.ms[lane], self.ms[lane] + (i == 0)) for i in range(steps)]


def test_rounds_alternate_and_ratios_are_theirs_over_ours() -> None:
    turns: list[str] = []
    ours, theirs = Runner("us", {"a": 2, "b": 8}, turns), Runner("peer", {"a": 6, "b": 4}, turns)
    ratios, kept = compare(ours, theirs, {"a": 5, "b": 3}, rounds=2, warm=1)
    assert [r.record()["faster_cpu"] for r in ratios] == [3.0, 0.5]
    assert [r.record()["faster_wall"] for r in ratios] == [3.0, 0.5]
    assert turns[:4] == ["us a 1", "peer a 1", "us b 1", "peer b 1"]  # warm
    assert turns[4:] == [
        "us a 5", "peer a 5", "us b 3", "peer b 3", "peer a 5", "us a 5", "peer b 3", "us b 3",
    ]  # fmt: skip
    assert len(kept["a"][0]) == len(kept["a"][1]) == 10


def test_equal_results_agree_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    ours = {"codes": rng.integers(9, size=(1, 4, 50)), "wave": rng.standard_normal((1, 1, 99))}
    assert agreement(ours, ours, "fp32").record() == {"equal": 1.0, "largest": 0.0, "fine": True}
    other = {**ours, "codes": (ours["codes"] + 1) % 9}
    assert not agreement(ours, other, "fp32").fine
    louder = {**ours, "wave": ours["wave"] * 1.01}
    assert not agreement(ours, louder, "fp32").fine
    with pytest.raises(errors.MoshiError, match="different shape"):
        agreement(ours, {**ours, "wave": ours["wave"][..., :9]}, "fp32")


def test_logits_count_until_the_first_other_token() -> None:
    """After it the two sides hear different things; in bf16 that is nobody's fault."""
    rng = np.random.default_rng(0)
    logits, tokens = rng.standard_normal((4, 1, 7)), np.zeros((4, 1, 2), dtype=np.int64)
    theirs = {"logits": logits.copy(), "tokens": tokens.copy()}
    theirs["logits"][3] += 9.0
    theirs["tokens"][2, 0, 1] = 5
    ours = {"logits": logits, "tokens": tokens}
    assert agreement(ours, theirs, "bf16").fine
    assert not agreement(ours, theirs, "fp32").fine  # 7 of 8 tokens are too few
    theirs["logits"][2] += 9.0
    assert not agreement(ours, theirs, "bf16").fine


# What is measured ---------------------------------------------------------------------------------


def test_sizes_have_their_published_parameters() -> None:
    def count(name: str) -> float:
        config = shapes.shape(name)
        with torch.device("meta"):
            module = MoshiLm(config.lm) if config.lm else Mimi(config.mimi)
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

    assert count("small") == 130.9 and count("stt-1b") == 989.2
    four = shapes.shape("moshi-7b", layers=4, context=100).lm
    assert four is not None and four.temporal.layers == 4 and four.temporal.context == 100
    with pytest.raises(errors.UsageError) as told:
        shapes.shape("stt1b")
    assert told.value.hint == "did you mean 'stt-1b'?"


def test_a_step_reads_matrices_once_and_rows_of_tables() -> None:
    lm = MoshiLm(TINY_LM)
    state = dict(lm.named_parameters())
    tables = ("emb", "text_emb.table", "depth.emb", "depth.text_emb.table")
    rest = sum(p.numel() for name, p in state.items() if name not in tables)
    rows = (8 + 1) * 16 + (3 + 1) * 16  # 8 codes and a word at width 16; 3 codes and a word again
    found = shapes.lm_reads(lm, batch=1)
    assert found.weights == 4 * (rest + rows)
    assert found.cache == 2 * 2 * 12 * 16 * 4  # k and v, layers, context, width, bytes
    assert shapes.lm_reads(lm, batch=3).weights == 4 * (rest + 3 * rows)


def test_random_weights_are_repeatable_and_tame() -> None:
    device = torch.device("cpu")
    assert TINY.lm is not None
    one, two = (shapes.random_lm(TINY.lm, torch.bfloat16, device, seed) for seed in (0, 0))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = shapes.random_lm(TINY.lm, torch.bfloat16, device, 1)
    assert not torch.equal(one.emb, other.emb)
    _, logits = one.temporal(torch.zeros(1, 9, 5, dtype=torch.long))
    assert torch.isfinite(logits).all() and 0.3 < logits.float().std() < 3
    codes = shapes.random_mimi(TINY_MIMI, device, 0).encode(torch.randn(1, 1, 1920 * 20) * 0.1)
    assert len(codes[0, 0].unique()) > 3


# Processes ----------------------------------------------------------------------------------------


def test_worker_is_another_process() -> None:
    """One that measures no model, and one that fails: its error arrives here."""
    with Worker(Job("bandwidth", device="cpu", threads=1)) as worker:
        assert worker.ready["bandwidth_gb_s"] > 0.01 and worker.ready["start_s"] > 0
    assert worker.process.poll() is not None
    with pytest.raises(errors.UsageError.__mro__[1], match="no size 'nonsense'") as told:
        Worker(Job("lm", config="nonsense", device="cpu", threads=1))
    assert told.value.exit_code == 2


class Local:
    """A Worker without the process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.candidate, self.ready = pit.prepare(job)
        self.ready["start_s"] = 0.5

    def ask(self, **message: Any) -> Any:
        assert self.candidate is not None
        return json.loads(json.dumps(pit.answer(self.candidate, self.job, message)))

    def outputs(self) -> Any:
        return dict(np.load(self.ask(do="outputs")["path"]))

    def laps(self, lane: str, steps: int, pace_s: float | None = None) -> list[Lap]:
        return [Lap(**lap) for lap in self.ask(do="laps", lane=lane, steps=steps)["laps"]]

    def end(self) -> Any:
        return self.ask(do="end")

    def close(self) -> None:
        pass

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on tiny sizes, in this process."""
    for name, config in {
        "tiny": TINY,
        "tiny-stt": STT,
        "tiny-mimi": replace(TINY, lm=None),
    }.items():
        monkeypatch.setitem(shapes.SHAPES, name, config)
    monkeypatch.setattr(machine, "COPIED_MB", 4)
    monkeypatch.setattr(pit, "bandwidth_gb_s", lambda device: 10.0)
    monkeypatch.setattr(bench_jobs, "Worker", Local)
    monkeypatch.setattr("moshi_cli.tasks.contest.Worker", Local)

    def run(*args: object) -> Any:
        return CliRunner().invoke(cli.app, ["bench", *map(str, args), "--device", "cpu"])

    return run


def records(done: Any, kind: str) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [row for row in rows if row["type"] == kind]


def test_lm_rows_are_batch_by_context_by_length(bench: Any) -> None:
    args = ("lm", "--config", "tiny", "--batches", "1,2", "--contexts", "6,9", "--lengths", "0,4")
    done = bench(*args, "--steps", 3, "--warm", 1, "--json")
    rows = records(done, "speed")
    assert [(r["batch"], r["context"], r["past_s"]) for r in rows] == [
        (b, c, s) for b in (1, 2) for c in (6, 9) for s in (0.0, 4.0)
    ]
    first = rows[0]
    assert first["steps"] == 3 and first["p50_ms"] <= first["p99_ms"] <= first["max_ms"]
    assert first["dtype"] == "fp32" and first["device"] == "cpu" and first["load_s"] >= 0
    share = first["weights_mb"] / (first["cpu_ms"] / first["threads"]) / 10.0
    assert first["bandwidth_share"] == pytest.approx(share, abs=2e-3)
    (machine_row,) = records(done, "machine")
    assert machine_row["bandwidth_gb_s"] == 10.0 and machine_row["cores"]


def test_codec_has_frames_and_files(bench: Any) -> None:
    done = bench("codec", "-c", "tiny-mimi", "--lengths", "0.4", "--steps", 2, "--json")
    rows = {row["lane"]: row for row in records(done, "speed")}
    assert list(rows) == ["encode", "decode", "encode file", "decode file"]
    assert rows["encode"]["steps"] == 2 and rows["encode file"]["steps"] == 1
    assert rows["encode file"]["rtf"] == pytest.approx(
        rows["encode file"]["p50_ms"] / 400, rel=1e-2
    )
    table = bench("codec", "-c", "tiny-mimi", "--lengths", "0", "--steps", 2, "--paced")
    assert table.exit_code == 0 and table.stdout.splitlines()[0].endswith("late")
    assert len(table.stdout.splitlines()) == 3


@pytest.mark.parametrize("task", ["asr", "tts", "chat"])
def test_tasks_tell_when_the_first_sound_and_text_came(bench: Any, task: str) -> None:
    done = bench(task, "-c", "tiny", "--steps", 2, "--batches", 2, "--json")
    (row,) = records(done, "speed")
    assert row["lane"] == "frame" and row["first_text_s"] > 0
    assert (row["first_audio_s"] is None) == (task == "asr")


def test_latency_adds_up(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_latency, "device_ms", lambda kind: (None, "not known: no device"))
    (row,) = records(bench("latency", "-c", "tiny", "--steps", 3, "--json"), "latency")
    pieces = {piece["name"]: piece for piece in row["pieces"]}
    assert pieces["frame"]["ms"] == 80 and pieces["acoustic delay"]["ms"] == 80
    assert pieces["by design"]["ms"] == 160  # the paper's
    parts = ("encode", "step", "decode", "rest of a frame")
    assert all(pieces[name]["ms"] > 0 for name in parts[:3])
    whole = 160 + sum(pieces[name]["ms"] for name in parts)
    assert pieces["in all"]["ms"] == pytest.approx(whole, abs=0.01)
    assert "microphone" in pieces["in all"]["how"]  # what is not known is named
    monkeypatch.setattr(bench_latency, "device_ms", lambda kind: (7.5, "says the driver"))
    (row,) = records(bench("latency", "-c", "tiny-stt", "--steps", 3, "--json"), "latency")
    pieces = {piece["name"]: piece for piece in row["pieces"]}
    assert pieces["delay of the text"]["ms"] == 160 and "decode" not in pieces
    assert pieces["in all"]["ms"] > pieces["by design"]["ms"] + 15


def test_driver_is_asked_for_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = types.SimpleNamespace(
        PortAudioError=OSError,
        query_devices=lambda device, kind: {f"default_high_{kind}_latency": 0.0345},
    )
    monkeypatch.setattr(devices, "sounddevice", lambda: asked)
    assert [piece.ms for piece in bench_latency.buffers()] == [34.5, 34.5]


# A peer -------------------------------------------------------------------------------------------


class Theirs:
    """Our codec with the interface of the peer's; `skew` makes it wrong."""

    def __init__(self, mimi: Mimi, skew: float) -> None:
        self.mimi, self.skew, self.state = mimi, skew, None

    def parameters(self) -> Iterator[torch.Tensor]:
        return self.mimi.parameters()

    def streaming(self, batch: int) -> ExitStack:
        stack = ExitStack()
        self.state = self.mimi.init_state(batch)
        stack.callback(lambda: setattr(self, "state", None))
        return stack

    def encode(self, wav: torch.Tensor) -> torch.Tensor:
        return self.mimi.encode(wav, self.state and self.state.encoder)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.mimi.decode(codes, self.state and self.state.decoder) * (1 + self.skew)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package `moshi` that is not Kyutai's, but has its loader."""

    def install(skew: float) -> None:
        loaders: Any = types.ModuleType("moshi.models.loaders")

        def get_mimi(path: Path, config: Any, device: Any, num_codebooks: int) -> Theirs:
            mimi = load_mimi(path, TINY_MIMI)
            mimi.set_num_codebooks(num_codebooks)
            return Theirs(mimi, skew)

        loaders.get_mimi, loaders.get_moshi_lm = get_mimi, None
        models: Any = types.ModuleType("moshi.models")
        models.loaders = loaders
        monkeypatch.setitem(sys.modules, "moshi", types.ModuleType("moshi"))
        monkeypatch.setitem(sys.modules, "moshi.models", models)

    return install


def test_peer_is_compared_on_the_same_weights(bench: Any, peer: Any) -> None:
    peer(skew=0.0)
    args = ("codec", "-c", "tiny-mimi", "--against", "kyutai", "--steps", 2, "--rounds", 3)
    done = bench(*args, "--lengths", "0.2", "--json")
    ratios = records(done, "ratio")
    assert [row["lane"] for row in ratios] == ["encode", "decode", "encode file", "decode file"]
    assert all(row["rounds"] == 3 and 0.1 < row["faster_cpu"] < 10 for row in ratios)
    near = ratios[0]["agreement"]
    assert near["equal"] == 1 and near["fine"] and near["largest"] < 1e-4  # ours is packed
    rows = records(done, "speed")
    assert [row["who"] for row in rows] == ["moshi"] * 4 + ["kyutai"] * 4
    assert rows[0]["steps"] == 6 and rows[4]["weights_mb"] == rows[0]["weights_mb"]
    table = bench(*args, "--lengths", "0")
    assert "times faster than kyutai" in table.stdout


def test_peer_with_other_results_is_not_timed(bench: Any, peer: Any) -> None:
    peer(skew=0.05)
    done = bench("codec", "-c", "tiny-mimi", "--against", "kyutai", "--steps", 2)
    assert done.exit_code == 1 and "computes something else" in done.stderr
    assert "faster" not in done.stdout


def test_missing_peer_is_one_line(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moshi", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("kyutai", "transformers"):
        done = bench("codec", "-c", "tiny-mimi", "--against", name)
        errors_ = [line for line in done.stderr.splitlines() if "error" in line]
        assert done.exit_code == 1 and len(errors_) == 1 and f"--against {name}" in errors_[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("lm", "-c", "tiny", "-m", "x"), "give one of them"),
        (("lm", "-c", "tiny-mimi"), "a codec alone"),
        (("lm", "-c", "tiny", "--batches", "0"), "above zero"),
        (("codec", "--against", "kyutai"), "needs a --config"),
        (("lm", "--contexts", "5"), "needs a --config"),
        (("lm", "-c", "tiny", "--against", "transformers"), "no step-by-step interface"),
    ],
)
def test_misuse_is_explained(bench: Any, args: tuple[str, ...], words: str) -> None:
    done = bench(*args)
    assert done.exit_code == 2 and words in done.stderr


def test_jobs_survive_the_pipe() -> None:
    job = Job("lm", config="small", past_frames=3, context=9)
    assert Job(**json.loads(json.dumps(asdict(job)))) == job
