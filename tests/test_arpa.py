"""Language models of words as tables of pieces, against sums over all words."""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import pytest
import torch

from moshi_cli.core.errors import InputError, ModelError
from moshi_cli.core.ngram import BESIDE, UNKNOWN, WORDED, NGram, load_ngram, shared
from moshi_cli.core.text import Text
from moshi_cli.core.wordgrams import UNHEARD, WordGrams, moved
from moshi_cli.tasks.arpa import Spelled, read_arpa
from moshi_cli.tasks.ngrams import count, sentences, words_of

WORDS = ["nine", "ninety", "seven", "seventy", "eleven", "even", "ten"]
EVERY = 1000


def write_arpa(path: Path, zipped: bool = False) -> dict[tuple[str, ...], float]:
    """A model of random probabilities; returns those of its n-grams."""
    rng = random.Random(4)
    single = {(word,): rng.uniform(0.5, 2) for word in WORDS}
    total = sum(single.values())
    p: dict[tuple[str, ...], float] = {gram: x / total for gram, x in single.items()}
    for history in (("<s>",), ("nine",), ("seven",), ("ten",)):
        for word in rng.sample(WORDS, 3):
            p[(*history, word)] = rng.uniform(0.05, 0.3)
    for history in (("<s>", "nine"), ("nine", "seven"), ("even", "even")):
        for word in rng.sample(WORDS, 2):
            p[(*history, word)] = rng.uniform(0.05, 0.4)
    lines = ["made up", "\\data\\", "ngram 1=9", ""]
    for n in (1, 2, 3):
        lines += [f"\\{n}-grams:"]
        if n == 1:
            lines += ["-1\t</s>", "-99 <s> -0.1", "-2\t<unk>"]
        for gram, x in p.items():
            if len(gram) == n:
                lines.append(f"{math.log10(x):.6f}\t{' '.join(gram)}" + "\t-0.2" * (n < 3))
    text = "\n".join([*lines, "", "\\end\\", ""])
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    return p


def slow(p: dict[tuple[str, ...], float], history: tuple[str, ...], word: str) -> float:
    """p(word | history): what histories leave goes to the others as shorter ones have it."""
    if (*history, word) in p or not history:
        return p[(*history, word)]
    own = [w for w in WORDS if (*history, w) in p]
    left = 1 - sum(p[(*history, w)] for w in own)
    shorter = 1 - sum(slow(p, history[1:], w) for w in own)
    return left / shorter * slow(p, history[1:], word)


def places(table: WordGrams, pieces: list[int]) -> torch.Tensor:
    place = torch.zeros(1, 3, dtype=torch.long)
    for piece in pieces:
        place = moved(place, torch.tensor([piece]), table.begin(torch.tensor([piece])))
    return place


@pytest.mark.parametrize("zipped", [False, True])
def test_pieces_are_sums_over_words(tmp_path: Path, tiny_text: Text, zipped: bool) -> None:
    p = write_arpa(tmp_path / "a.arpa", zipped)
    table = Spelled(read_arpa(tmp_path / "a.arpa"), tiny_text).tables(EVERY)
    spelled = {word: tiny_text.encode(word) for word in WORDS}
    assert any(len(pieces) > 2 for pieces in spelled.values())
    every = torch.arange(4, tiny_text.size)[None]
    cases = [[], ["nine"], ["nine", "seven"], ["ten"], ["even", "even"], ["seven", "nine", "seven"]]
    for said in cases:
        history = ("<s>", *said)[-2:]
        before = [piece for word in said for piece in spelled[word]]
        for word in WORDS:
            for n in range(len(spelled[word])):
                begun = spelled[word][:n]
                found = table(places(table, [*before, *begun]), every)[0]
                for i, piece in enumerate(every[0].tolist()):
                    if (not n and not table.begins[piece]) or (n and table.begins[piece]):
                        continue
                    mass = [
                        sum(slow(p, history, w) for w in WORDS if spelled[w][: len(x)] == x)
                        for x in ([*begun, piece], begun)
                    ]
                    if not mass[0]:
                        assert float(found[i]) == UNHEARD
                        continue
                    wanted = math.log(mass[0] / mass[1])
                    if said and not n:  # that the word before ends, after no word in particular
                        last = spelled[said[-1]]
                        longer = sum(p[w,] for w in WORDS if spelled[w][: len(last)] == last)
                        wanted += math.log(p[said[-1],] / longer)
                    assert float(found[i]) == pytest.approx(wanted, abs=1e-3)


def test_what_tells_little_is_left_out(tmp_path: Path, tiny_text: Text) -> None:
    write_arpa(tmp_path / "a.arpa")
    spelled = Spelled(read_arpa(tmp_path / "a.arpa"), tiny_text)
    sizes = []
    for kept in (0, 1, 5, EVERY):
        table = spelled.tables(kept)
        sizes.append(len(table.masses.keys))
        first = torch.arange(4, tiny_text.size)[table.begins[4:]][None]
        for said in ([], ["nine"], ["nine", "seven"]):
            before = [piece for word in said for piece in tiny_text.encode(word)]
            place = places(table, before)
            whole = float(table(place, first).exp().sum())
            ends = table.masses.find(torch.zeros(1, dtype=torch.long))  # none: nothing is there
            assert not ends[1]
            assert whole <= 1 + 1e-4 and (said or whole == pytest.approx(1, abs=1e-4))
    assert sizes == sorted(set(sizes))


def test_a_word_that_is_not_there(tmp_path: Path, tiny_text: Text) -> None:
    write_arpa(tmp_path / "a.arpa")
    table = Spelled(read_arpa(tmp_path / "a.arpa"), tiny_text).tables(EVERY)
    odd = tiny_text.encode("zoo")
    for n in range(1, len(odd)):  # not even once nothing begins like that
        assert float(table(places(table, odd[:n]), torch.tensor([odd[n : n + 1]]))) == UNHEARD
    assert float(table(places(table, []), torch.tensor([odd[1:2]]))) == UNHEARD  # of no word
    after = table(places(table, odd), torch.tensor([tiny_text.encode("nine")[:1]]))
    assert -15 < float(after) < 0  # what comes next goes on as after any word
    beyond = table(places(table, [tiny_text.size + 5]), torch.tensor([[tiny_text.size + 5]]))
    assert float(beyond) == UNHEARD


def worded(path: Path, text: Text) -> NGram:
    write_arpa(path)
    spelled = Spelled(read_arpa(path), text)
    rows = sentences(["seven eleven", "nine"], text)
    made = count(rows, 3, text.size)
    made.words = words_of([*rows, *spelled.rows], text)
    made.wordgrams = spelled.tables(EVERY)
    return made


def test_words_have_a_share(tmp_path: Path, tiny_text: Text) -> None:
    made = worded(tmp_path / "a.arpa", tiny_text)
    made.save(tmp_path / "n")
    again = load_ngram(tmp_path / "n")
    assert made.words is not None and made.wordgrams is not None and again.wordgrams is not None
    nine = tiny_text.encode("nine")
    past, every = torch.tensor([[1, *nine]]), torch.arange(4, tiny_text.size)[None]
    past = torch.nn.functional.pad(past, (made.context - past.shape[1], 0), value=-1)
    place = places(made.wordgrams, nine)
    alone = made.table(past, every)
    wanted = shared(alone, made.wordgrams(place, every), WORDED)
    for ngram in (made, again, again.to("cpu")):
        unknown = UNKNOWN * made.words.unknown(place, every)
        found = ngram(past, every, None, place)
        torch.testing.assert_close(found, wanted - unknown, atol=2e-2, rtol=0)
        torch.testing.assert_close(ngram(past, every), alone, atol=2e-2, rtol=0)
        both = count(sentences(["nine ten"], tiny_text), 3, tiny_text.size).mixed(ngram)
        beside = shared(both.table(past, every), found, BESIDE)
        torch.testing.assert_close(both(past, every, None, place), beside)
    told = again.placed(torch.zeros(2, 3, dtype=torch.long), torch.tensor([nine[0], EVERY]))
    assert told[0].tolist() == places(made.wordgrams, nine[:1])[0].tolist()
    ten = tiny_text.encode("ten")  # a word of the ARPA file alone
    for i, piece in enumerate(ten):
        assert not made.words.unknown(places(made.wordgrams, ten[:i]), torch.tensor([[piece]]))


def test_files_that_are_none(tmp_path: Path, tiny_text: Text) -> None:
    path = tmp_path / "a.arpa"
    whole = "\\data\\\n\\1-grams:\n-1\tnine\n-1\tten\n\\2-grams:\n-1\tnine ten\n\\end\\\n"
    for text, said in (
        ("hello\n", "not a language model in the ARPA format"),
        ("\\data\\\n\\1-grams:\n\\end\\\n", "no 1-grams"),
        ("\\data\\\n\\2-grams:\n", r"a.arpa:2: \\2-grams: instead of"),
        (whole.replace("nine ten", "nine two"), r"a.arpa:6: not an 2-gram \('two'\)"),
        (whole.replace("nine ten", "nine"), "a.arpa:6: not an 2-gram"),
        (whole.replace("-1\tten", "x\tten"), "a.arpa:4: not an 1-gram"),
        (whole.replace("-1\tten", "nan\tten"), "a.arpa:4: not an 1-gram"),
        (whole.replace("-1\tten", "-inf\tten"), "a.arpa:4: not an 1-gram"),
        (whole.replace("-1\tnine ten", "\n\\3-grams:\n-1\tten nine ten"), "no 2-grams"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_arpa(path)
    path.write_bytes(gzip.compress(whole.encode())[:40])
    with pytest.raises(InputError, match=r"a\.arpa"):
        read_arpa(path)
    with pytest.raises(InputError, match="nowhere"):
        read_arpa(tmp_path / "nowhere")
    path.write_text("\\data\\\n\\1-grams:\n-1\t<s>\n-1\t</s>\n\\end\\\n")
    with pytest.raises(InputError, match="no word"):
        Spelled(read_arpa(path), tiny_text)
    made = worded(path, tiny_text)
    assert made.wordgrams is not None
    made.wordgrams.backs.values = made.wordgrams.backs.values[1:]
    made.save(tmp_path / "n")
    with pytest.raises(ModelError, match="its n-grams of words are broken"):
        load_ngram(tmp_path / "n")
