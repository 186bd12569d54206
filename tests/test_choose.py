"""Of what is said word for word, the clearest takes are kept, as they were."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks.cache import REST, Cache, Take

WIDTH = 6
# id, kind, text, frames; the ear likes the third character of the id
TAKES = (
    ("a-1", "moshi-answer", "one two sky", 9),
    ("b-3", "moshi-answer", "hello four", 7),
    ("c-3", "moshi-answer", "one two sky", 8),
    ("d-9", "moshi-open", "one two sky", 6),
    ("e-2", "moshi-answer", "one two sky", 5),
)


@pytest.fixture
def choose(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(root / "examples" / "train_builtin"))
    scripts = ("choose", "rehearse")  # others may have loaded one of them
    for name in scripts:
        sys.modules.pop(name, None)
    import choose

    yield choose
    for name in scripts:
        sys.modules.pop(name, None)


def cached(folder: Path, mimi: Mimi) -> Cache:
    """A cache in two shards."""
    rng = np.random.default_rng(4)
    facts = {"codebooks": 4, "codebook_size": 32, "codec": "tiny", "residual": WIDTH}
    for part, some in enumerate((TAKES[:3], TAKES[3:])):
        shard = folder / f"part-{part}"
        shard.mkdir(parents=True)
        (shard / "cache.json").write_text(json.dumps({**facts, "seed": part}))
        at, lines = 0, []
        for name, kind, text, frames in some:
            words = [[w, 0.1 * i, 0.1 * i + 0.1] for i, w in enumerate(text.split())]
            row = {"id": name, "kind": kind, "voice": "own", "text": text, "words": words}
            lines.append(json.dumps({**row, "first": at, "frames": frames, "qa": len(text)}))
            at += frames
        (shard / "index.jsonl").write_text("\n".join(lines) + "\n")
        (shard / "codes.i16").write_bytes(rng.integers(0, 32, (at, 4)).astype(np.int16).tobytes())
        (shard / REST).write_bytes(rng.normal(size=(at, WIDTH)).astype(np.float16).tobytes())
    return Cache(folder, 4, WIDTH)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_clearest_take_of_each_text_is_kept(
    keep: int,
    choose: ModuleType,
    tiny_mimi: Mimi,
    tiny_lm: MoshiLm,
    tiny_text: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = cached(tmp_path / "codes", tiny_mimi)
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config)
    model = Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")
    heard: list[Take] = []

    def judged(model: Model, ear: object, takes: list, window_s: float) -> list[list[float]]:
        heard.extend(one.take for one in takes)
        for one in takes:
            assert torch.equal(one.codes, before.read(one.take)[:4].long())
        return [[-1 / int(one.take.id[2])] * len(one.words) for one in takes]

    monkeypatch.setattr(choose, "judged", judged)
    monkeypatch.setattr(choose, "Ear", lambda folder: None)
    monkeypatch.setattr(choose, "load", lambda name, dtype: model)
    argv = ["choose.py", "tiny", "ear", str(tmp_path / "codes"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--keep", str(keep)])
    choose.main()
    assert {take.id for take in heard} == {"a-1", "b-3", "c-3", "e-2"}
    after = Cache(tmp_path / "out", 4, WIDTH)
    assert [take.id for take in after.takes] == (
        ["c-3", "b-3"] if keep == 1 else ["c-3", "e-2", "b-3"]
    )
    old = {take.id: take for take in before.takes}
    for take in after.takes:
        assert take.kind == "moshi-answer-clear" and take.words == old[take.id].words
        assert take.qa == old[take.id].qa
        assert torch.equal(after.read(take), before.read(old[take.id]))


def test_long_takes_are_left_out(choose: ModuleType, tiny_mimi: Mimi, tmp_path: Path) -> None:
    cache = cached(tmp_path / "codes", tiny_mimi)
    cache.takes[0] = Take("x", "moshi-answer", "own", "one", (), 0, 13 * 30)
    assert "x" not in [one.take.id for one in choose.candidates(cache, ("moshi-answer",))]
