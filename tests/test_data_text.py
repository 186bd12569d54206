"""`moshi data tokenizer` and `moshi data text`, from files to a pack that a stage reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core.ngram import load_ngram
from moshi_cli.core.text import Text
from moshi_cli.data_text import parsed
from moshi_cli.tasks.texts import read_pack

ENGLISH = [
    "The sky is blue, and there is nothing that we could say about it.",
    "It was a bright day, and the clocks were striking in the house by the sea.",
    "When they had been there for 12 days, all of them were tired of the rain.",
]
FRENCH = "Le ciel est bleu et il ne pleut pas dans les rues de la ville."


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n\n".join([*ENGLISH, ENGLISH[0], "A B C D", FRENCH]))
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"body": ENGLISH[1], "text": "x"}) + "\n")
    return tmp_path / "in"


def invoke(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["data", *map(str, args)])
    return done.exit_code, done.stdout, done.stderr


def test_a_tokenizer_and_a_pack(corpus: Path) -> None:
    code, out, _ = invoke("tokenizer", corpus, "-o", "t/text.model", "--size", 300, "--json")
    assert code == 0 and json.loads(out)["pieces"] <= 300
    text = Text("t/text.model")
    assert len(text.encode("1234")) >= 4
    code, out, err = invoke("text", corpus / "a.txt", "-o", "pack", "--tokenizer", "t/text.model")
    assert (code, out) == (0, "pack\n")
    assert "3 documents" in err and "dropped: 1 by duplicates, 2 by language" in err
    assert len(read_pack(Path("pack"), text)) > 60
    one = ("text", corpus / "b.jsonl", "-o", "pack", "--tokenizer", "t/text.model", "--json")
    code, out, _ = invoke(*one, "--key", "body", "--filter", "quality:least=0.9")
    assert code == 0 and json.loads(out)["documents"] == 1
    assert json.loads(out)["dropped"] == {"quality:least=0.9": 0}
    code, out, _ = invoke(*one, "--no-filter")
    assert json.loads(out)["documents"] == 1


def test_ngrams(corpus: Path) -> None:
    invoke("tokenizer", corpus, "-o", "t.model", "--size", 300)
    args = ("ngrams", corpus / "a.txt", "-o", "n.safetensors", "--tokenizer", "t.model")
    code, out, err = invoke(*args, "--order", 3)
    assert (code, out) == (0, "n.safetensors\n") and "n-grams" in err
    made = load_ngram(Path("n.safetensors"))
    assert (made.order, made.size) == (3, Text("t.model").size)
    assert made.words is not None and len(made.words.known) > 10
    assert made.recurrent is None
    code, out, err = invoke(*args, "--recurrent", 2)
    assert code == 0 and "pass 2: " in err
    whole = load_ngram(Path("n.safetensors"))
    assert whole.recurrent is not None and len(whole.recurrent.bias) == whole.size
    assert whole.grams.keys.tolist() != [] and whole.words is not None
    words = "\\data\\\n\\1-grams:\n-1\tclocks\n-1\train\n\\2-grams:\n-1\train clocks\n\\end\\\n"
    Path("w.arpa").write_text(words)
    assert made.wordgrams is None and invoke(*args, "--arpa", "w.arpa")[0] == 0
    both = load_ngram(Path("n.safetensors"))
    assert both.wordgrams is not None and both.words is not None and made.words is not None
    assert len(both.words.known) > len(made.words.known)
    assert invoke(*args, "--arpa", "w.arpa", "--arpa-size", 0)[0] == 0
    less = load_ngram(Path("n.safetensors")).wordgrams
    assert less is not None and len(less.masses.keys) < len(both.wordgrams.masses.keys)
    code, _, err = invoke(*args, "--arpa", corpus / "a.txt")
    assert code == 2 and "not a language model in the ARPA format" in err
    code, out, _ = invoke(*args, "--least", "1,1,1", "--json")
    assert code == 0 and json.loads(out)["entries"] > len(made.grams.keys)
    code, _, err = invoke(*args, "--least", "two")
    assert code == 2 and "'two' is not numbers" in err
    Path("empty.txt").write_text("\n")
    Path("loud.txt").write_text("(It's) 'well-known', he said!\n-- Yes.\n")
    Path("bare.txt").write_text("It's well-known he said\nYes\n")
    deep = Path("new", "folder", "n.safetensors")
    for name, more in (("bare", ()), ("loud", ("--no-punctuation",))):
        assert invoke("ngrams", f"{name}.txt", "-o", deep.with_stem(name), *args[4:], *more)[0] == 0
    bare, loud = (load_ngram(deep.with_stem(name)) for name in ("bare", "loud"))
    assert bare.grams.keys.tolist() == loud.grams.keys.tolist()
    code, _, err = invoke("ngrams", "empty.txt", *args[2:])
    assert code == 2 and "no text to count" in err


def test_mistakes(corpus: Path) -> None:
    invoke("tokenizer", corpus, "-o", "t.model", "--size", 300)
    start = ("text", corpus / "a.txt", "-o", "pack", "--tokenizer")
    for args, code, said in (
        ((*start, "nothing.model"), 4, "no model at 'nothing.model'"),
        ((*start, "t.model", "--filter", "qualty"), 2, "no text filter 'qualty'"),
        ((*start, "t.model", "--filter", "quality:least=0.9,x"), 2, "not of the form KEY=VALUE"),
        ((*start, "t.model", "--filter", "quality:leest=1"), 2, "leest"),
        ((*start, "t.model", "--no-filter", "--filter", "quality"), 2, "contradict"),
        (("tokenizer", "nowhere", "-o", "x"), 2, "nowhere"),
    ):
        assert invoke(*args)[0] == code and said in invoke(*args)[2], args
    assert not Path("pack").exists()


def test_steps_with_settings() -> None:
    assert parsed("quality") == ("quality", {})
    assert parsed("a.b:Class") == ("a.b:Class", {})
    assert parsed("a.b:Class:x=2,y=z") == ("a.b:Class", {"x": 2, "y": "z"})
    assert parsed("language:wanted=en+fr,least=0.1")[1] == {"wanted": ["en", "fr"], "least": 0.1}


def test_a_tokenizer_of_the_words_of_recordings(tmp_path: Path) -> None:
    rows = [{"id": "a", "words": [["Hello", 0, 1], ["Sky", 1, 2]]}, {"id": "b", "words": []}]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 9))
    args = ("-o", tmp_path / "t.model", "--size", 270, "--key", "words", "--fold-case")
    assert invoke("tokenizer", tmp_path / "index.jsonl", *args)[0] == 0
    text = Text(tmp_path / "t.model")
    assert text.decode(text.encode("HELLO Sky")) == "hello sky"
