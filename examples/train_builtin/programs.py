"""The two programs that evaluate.py calls: the command `moshi`, and the judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOLD = 20  # last lines of stderr that are shown when a program fails


@dataclass
class Ran:
    """One call of the command: a record per item, and what it took."""

    items: dict[str, dict[str, Any]]  # id -> status line: outputs, audio_s, rtf, …
    summary: dict[str, Any]  # audio_s, wall_s, rtf of the work itself
    wall_s: float  # of the whole process, start and loading included
    core_s: float  # CPU time of the whole process
    said: str  # on stderr

    @property
    def failed(self) -> list[str]:
        return [id for id, item in self.items.items() if item["status"] != "ok"]

    def output(self, id: str, suffix: str) -> Path | None:
        """The result of an item with this suffix, None if there is none."""
        outputs = self.items.get(id, {}).get("outputs", [])
        return next((Path(path) for path in outputs if path.endswith(suffix)), None)

    def speed(self) -> dict[str, float]:
        """rtf: wall seconds of work per second of sound; core_rtf: CPU seconds, start included."""
        audio_s = self.summary["audio_s"] or 1e-9
        return {
            "audio_s": self.summary["audio_s"], "rtf": round(self.summary["rtf"], 4),
            "core_rtf": round(self.core_s / audio_s, 4),
            "start_s": round(self.wall_s - self.summary["wall_s"], 2),
        }  # fmt: skip


@dataclass
class Moshi:
    """The installed command. `extra` holds options by command name, e.g. {"chat": ["--greedy"]}."""

    command: Sequence[str]
    model: str | None = None
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __call__(
        self, words: str, items: Iterable[Mapping[str, Any]], out: Path, *options: str
    ) -> Ran:
        """`moshi WORDS` over the items of a manifest, results in the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        manifest = out / "manifest.jsonl"
        manifest.write_text("".join(json.dumps(item) + "\n" for item in items))
        line = [*self.command, *words.split(), "--manifest", str(manifest)]
        line += ["--output-dir", str(out), "--status", "jsonl", *options]
        line += self.extra.get(words.split()[0], [])
        line += ["--model", self.model] if self.model else []
        with (out / "stdout.jsonl").open("w+") as stdout, (out / "stderr.txt").open("w+") as stderr:
            began = time.monotonic()
            process = subprocess.Popen(line, stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - began
            code = process.returncode = os.waitstatus_to_exitcode(status)
            stdout.seek(0)
            stderr.seek(0)
            told, said = stdout.read(), stderr.read()
        if code not in (0, 3):  # 3: some items failed
            tail = "\n".join(said.splitlines()[-TOLD:])
            raise SystemExit(f"{' '.join(line)}\nended with {code}:\n{tail}")
        records = [json.loads(text) for text in told.splitlines() if text.startswith("{")]
        found = {record["id"]: record for record in records if record["type"] == "item"}
        (summary,) = [record for record in records if record["type"] == "summary"]
        return Ran(found, summary, wall_s, usage.ru_utime + usage.ru_stime, said)

    def told(self, *line: str) -> str:
        """What one plain call says on stderr."""
        whole = [*self.command, *line, *self.extra.get(line[0], [])]
        whole += ["--model", self.model] if self.model else []
        return subprocess.run(whole, capture_output=True, text=True, check=True).stderr

    def version(self) -> str:
        line = [*self.command, "--version"]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


@dataclass
class Judge:
    """A recogniser in an environment of its own (judge.py)."""

    python: str
    whisper: Path
    work: Path
    threads: int = 1
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, files: Iterable[Path]) -> dict[Path, str]:
        """What is said in each of these files."""
        wanted = list(dict.fromkeys(str(file) for file in files))
        self.work.mkdir(parents=True, exist_ok=True)
        listed, out = self.work / "files.json", self.work / "transcripts.json"
        listed.write_text(json.dumps(wanted))
        script = str(Path(__file__).with_name("judge.py"))
        line = [self.python, script, str(self.whisper), str(listed), str(out)]
        line += ["--threads", str(self.threads), "--cache", str(self.work / "cache.jsonl")]
        if subprocess.run(line, stdout=sys.stderr).returncode:
            raise SystemExit("the judge failed: is --judge-python the one of teachers.sh?")
        heard = json.loads(out.read_text())
        self.facts = heard["judge"]
        return {Path(file): text for file, text in heard["transcripts"].items()}
