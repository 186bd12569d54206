"""native.c computes what PyTorch does: products, stacks of layers, searches; and may be missing."""

from __future__ import annotations

import copy
import ctypes
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor

from moshi_cli.core import native
from moshi_cli.core.attention import Transformer, TransformerState
from moshi_cli.core.config import DepthConfig, TransformerConfig
from moshi_cli.core.layers import RMSNorm
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.packing import SplitLinear, pack
from moshi_cli.core.sampling import GREEDY
from moshi_cli.core.vq import ResidualVq

LANES = (4, 8, 16)


@pytest.fixture
def there() -> None:
    if native.library() is None:
        pytest.skip("no C compiler here")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ctypes.CDLL]:
    """native.c for each length of a register."""
    if native.library() is None:
        pytest.skip("no C compiler here")
    folder, found = tmp_path_factory.mktemp("native"), {}
    for lanes in LANES:
        path = folder / f"{lanes}.so"
        command = [*shlex.split(native.compiler_command()), "-O1", "-shared", "-fPIC"]
        command += [f"-DLANES={lanes}", "-o", str(path), str(native.SOURCE), "-lm"]
        subprocess.run(command, check=True)
        found[lanes] = native.opened(path)
        assert found[lanes].lanes() == lanes
    return found


@pytest.fixture(params=LANES)
def registers(
    request: pytest.FixtureRequest,
    libraries: dict[int, ctypes.CDLL],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine whose registers have so many numbers."""
    monkeypatch.setattr(native, "library", lambda: libraries[request.param])


@pytest.fixture
def anew() -> Iterator[None]:
    """`library` is looked for again, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize(("into", "part"), [(16, 16), (48, 48), (96, 32), (512, 512)])
@pytest.mark.parametrize("out", [1, 2, 7, 64])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_product(rows: int, out: int, into: int, part: int) -> None:
    x, weight, bias = torch.randn(rows, into), torch.randn(out, into), torch.randn(out)
    lying = weight.view(out, -1, part).transpose(0, 1).contiguous()
    close(native.product(x, lying, bias, part), F.linear(x, weight, bias))
    close(native.product(x, lying, None, part), F.linear(x, weight))


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize(("into", "part"), [(16, 16), (96, 32)])
@pytest.mark.parametrize("out", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 9, 16, 33, 50])
def test_product_of_many_rows(rows: int, out: int, into: int, part: int) -> None:
    x, weight, bias = torch.randn(rows, into), torch.randn(out, into), torch.randn(out)
    lying = weight.view(out, -1, part).transpose(0, 1).contiguous()
    lib, room = native.library(), torch.empty(part * 2 * native.WIDTH)
    assert lib is not None
    for b in (bias, None):
        y = torch.full((rows + 1, out), 7.0)
        lib.columns(
            lying.data_ptr(), None if b is None else b.data_ptr(), x.data_ptr(), y.data_ptr(),
            rows, into, out, part, room.data_ptr(),
        )  # fmt: skip
        close(y[:rows], F.linear(x, weight, b))
        assert y[rows].eq(7).all()


STACKS = {
    "mimi": TransformerConfig(
        dim=64, heads=2, layers=2, ff=96, context=5, norm="layer", gated=False, layer_scale=0.3
    ),
    "lm": TransformerConfig(dim=64, heads=4, layers=3, ff=72, context=70),
    "grouped": TransformerConfig(dim=96, heads=2, layers=1, ff=96, context=4, kv_repeat=2),
    "unmoved": TransformerConfig(dim=160, heads=2, layers=1, ff=96, context=9, rope="none"),
}  # fmt: skip


def pair(config: TransformerConfig) -> tuple[Transformer, Transformer]:
    """The same stack, packed and not."""
    lm = MoshiLm(replace(TINY_LM, temporal=config)).eval().requires_grad_(False)
    for module in lm.modules():
        if isinstance(module, RMSNorm):
            module.alpha.uniform_(0.5, 1.5)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
    plain = copy.deepcopy(lm)
    if config.layer_scale is not None:  # a codec's, which packing folds into the products
        for layer in lm.transformer.layers:
            for scale, last in ((layer.scale1, layer.attn.out), (layer.scale2, layer.mlp.down)):
                last.weight.mul_(scale.scale[:, None])
                scale.scale = None
    pack(lm)
    assert lm.transformer.native is not None
    return lm.transformer, plain.transformer


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 11])
@torch.no_grad()
def test_stack(name: str, slots: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rings have gone round, with pauses, a new stream, and pieces that are turned."""
    quick, slow = pair(STACKS[name])
    D, steps = STACKS[name].dim, 0
    states: list[TransformerState] = [
        t.init_state(slots, dtype=torch.float32, device="cpu", chunk=2) for t in (quick, slow)
    ]
    called: list[int] = []
    walk = native.Stack.step

    def counted(self: native.Stack, x: Tensor, *rest: object) -> Tensor:
        called.append(len(x))
        return walk(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native.Stack, "step", counted)
    for i in range(2 * STACKS[name].context // chunk + 3):
        x = torch.randn(slots, D, chunk).transpose(1, 2)
        active = (torch.arange(slots) + i) % 5 != 0 if i % 2 else None
        close(quick(x, states[0], active), slow(x, states[1], active))
        steps += chunk * (1 if active is None else int(active[0]))
        if i == 4:
            for state in states:
                state.reset(torch.arange(slots) == 1)
    assert states[0].clock.tolist() == states[1].clock.tolist()
    assert states[0].clock[0] == steps
    assert set(called) == {slots * chunk} and len(called) > 5
    x = torch.randn(slots, 6, D)  # more at once, then on
    close(quick(x, states[0]), slow(x, states[1]))
    close(quick(x[:, :1], states[0]), slow(x[:, :1], states[1]))


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_older_keys_are_those_of_the_first_of_a_group(name: str) -> None:
    """What the others have there is not looked at."""
    quick, slow = pair(STACKS[name])
    own, group = 3, 4
    states: list[TransformerState] = [
        t.init_state(12, dtype=torch.float32, device="cpu", chunk=1) for t in (quick, slow)
    ]
    states[0].group, states[0].own = group, own
    latest = torch.randn(own - 1, 12, 1, STACKS[name].dim)
    shared = torch.randn(2 * STACKS[name].context, 3, 1, 1, STACKS[name].dim)
    for x in shared.expand(-1, -1, group, -1, -1).flatten(1, 2):
        close(quick(x, states[0]), slow(x, states[1]))
    for x in latest:
        close(quick(x, states[0]), slow(x, states[1]))
    cells = states[0].clock[0] - torch.arange(own - 1) - 1
    there = torch.zeros(states[0].layers[0].k.shape[2], dtype=torch.bool)
    there[cells % len(there)] = True
    others = torch.arange(12) % group > 0
    for cache in states[0].layers:
        for keys in (cache.k, cache.v):
            keys[(others[:, None] & ~there)[:, None].expand(keys.shape[:3])] = torch.nan
    x = torch.randn(12, 1, STACKS[name].dim)
    close(quick(x, states[0]), slow(x, states[1]))


@pytest.mark.usefixtures("registers")
def test_cells_follow() -> None:
    rings = [torch.randn(5, 2, 7, 16) for _ in range(3)]
    to, source = torch.tensor([0, 1, 3, 4]), torch.tensor([1, 0, 3, 0])
    cells = torch.tensor([[0, 6], [2, 1], [3, 3], [6, 0]])
    wanted = [ring.clone() for ring in rings]
    for ring, new in zip(rings, wanted, strict=True):
        for a, b, each in zip(to.tolist(), source.tolist(), cells.tolist(), strict=True):
            new[a, :, each] = ring[b, :, each]
    native.follow(rings, to, source, cells)
    for ring, new in zip(rings, wanted, strict=True):
        assert ring.equal(new)


@pytest.mark.usefixtures("there")
@torch.no_grad()
def test_what_is_not_for_it_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = pair(STACKS["lm"])
    monkeypatch.setattr(native.Stack, "step", lambda *_: pytest.fail("called"))
    many = native.MANY + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.randn(many, 1, 64)
    for slots, exact, dtype in ((many, True, torch.float32), (1, False, torch.float32),
                                (1, True, torch.bfloat16)):  # fmt: skip
        a, b = (
            t.init_state(slots, dtype=dtype, device="cpu", exact_window=exact)
            for t in (quick, slow)
        )
        close(quick(x[:slots], a), slow(x[:slots], b))
    close(quick(x), slow(x))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("widths", [{"heads": 4}, {"ff": 60}, {"rope": "half"}], ids=str)
@torch.no_grad()
def test_other_widths_stay_with_pytorch(widths: dict[str, int]) -> None:
    config = replace(TransformerConfig(dim=32, heads=2, layers=1, ff=48, context=4), **widths)
    lm = MoshiLm(replace(TINY_LM, temporal=config)).eval()
    pack(lm)
    assert lm.transformer.native is None


@pytest.mark.usefixtures("there")
@torch.no_grad()
def test_large_matrices_are_left_to_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.alone(native.STACK + 1, native.STACK)  # the tests have one
    assert native.few(native.MANY + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert native.alone(native.STACK, native.STACK)
    monkeypatch.setattr(native, "STACK", 100)
    monkeypatch.setattr(native, "MATRIX", 100)
    monkeypatch.setattr(native, "product", lambda *_: pytest.fail("called"))
    lm = MoshiLm(replace(TINY_LM, temporal=STACKS["lm"])).eval()
    pack(lm)
    assert lm.transformer.native is None
    lm.text_linear(torch.randn(1, 64))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("norm_out", [None, "layer"])
@torch.no_grad()
def test_depth(norm_out: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = DepthConfig(
        dim=32, heads=2, layers=2, ff=48, schedule=(0, 1, 1, 2), inputs=(0, 1, 1, 2), low_rank=16,
        norm_out=norm_out,
    )  # fmt: skip
    config = replace(TINY_LM, depth=depth)
    plain = MoshiLm(config).eval().requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack(packed)
    assert packed.depth is not None and plain.depth is not None
    assert packed.depth.steps is not None and packed.depth.steps[0].native is not None
    for rows in (1, 2, 5, 8, 9):
        h, text = torch.randn(rows, config.temporal.dim), torch.randint(9, (rows,))
        codes, logits = packed.depth.sample(h, text, GREEDY)
        same, expected = plain.depth.sample(h, text, GREEDY)
        assert torch.equal(codes, same)
        close(logits, expected)


def wide_mimi() -> Mimi:
    """A codec that native.c can do all of."""
    transformer = replace(TINY_MIMI.transformer, dim=32, ff=64)
    quantizer = replace(TINY_MIMI.quantizer, dim=16, size=33)
    seanet = replace(TINY_MIMI.seanet, dim=32)
    mimi = Mimi(replace(TINY_MIMI, seanet=seanet, transformer=transformer, quantizer=quantizer))
    mimi = mimi.eval().requires_grad_(False)
    latents = mimi.encode_latent(torch.rand(4, 1, 32 * 1920) * 2 - 1).transpose(1, 2).flatten(0, 1)
    mimi.quantizer.fit(latents, generator=torch.Generator().manual_seed(0))
    return mimi


@pytest.mark.usefixtures("there")
@torch.no_grad()
def test_codec_codes_and_sounds_the_same() -> None:
    plain = wide_mimi()
    packed = copy.deepcopy(plain)
    pack(packed)
    assert packed.encoder_transformer.native and packed.quantizer.acoustic.native
    wav = torch.rand(1, 1, 30 * 1920) * 2 - 1
    codes = plain.encode(wav)
    state = packed.init_state(1)
    heard = [packed.encode(part, state.encoder) for part in wav.split(1920, -1)]
    assert torch.equal(torch.cat(heard, -1), codes)
    said = [packed.decode(part, state.decoder) for part in codes.split(1, -1)]
    close(torch.cat(said, -1), plain.decode(codes))
    packed.quantizer.active = 2
    assert torch.equal(packed.encode(wav[..., :1920]), codes[:, :2, :1])


@pytest.mark.usefixtures("registers")
@torch.no_grad()
def test_the_first_of_equal_entries_is_found() -> None:
    vq = ResidualVq(16, replace(TINY_MIMI.quantizer, dim=16, size=5), 1)
    vq.books[0].embedding_sum.copy_(torch.eye(5, 16)[[2, 0, 1, 0, 1]])
    vq.books[0].refresh()
    books = native.Books([vq.books[0].centroids], [vq.books[0].half_norm])
    for entry, first in ((0, 1), (1, 2), (2, 0), (9, 0)):
        assert books.nearest(torch.eye(16)[entry], 1).tolist() == [first]


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("beam", [1, 2, 5, 8, 32])
@torch.no_grad()
def test_search(beam: int) -> None:
    """The paths of `ResidualVq.search`, from the first book on."""
    vq = ResidualVq(16, replace(TINY_MIMI.quantizer, dim=32, size=48, beam=beam), 5)
    for book in vq.books:
        book.embedding_sum.normal_()
        book.refresh()
    lists = [b.centroids for b in vq.books], [b.half_norm for b in vq.books]
    books, x = native.Books(*lists, beam), torch.randn(40, 32) * 2
    for count in (1, 2, 5):
        found = torch.stack([books.nearest(row, count) for row in x])
        assert torch.equal(found, vq.search(x, count))


@pytest.mark.usefixtures("anew")
def test_without_it_all_is_done_by_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wide_mimi()
    for key, value in (
        (native.SWITCH, "0"), ("CC", "no-such-compiler"), ("CC", "false"), ("CC", "cc '"),
    ):  # fmt: skip
        with monkeypatch.context() as m:
            m.setenv("XDG_CACHE_HOME", str(tmp_path))
            m.setenv(key, value)
            native.library.cache_clear()
            assert native.library() is None
            mimi = copy.deepcopy(plain)
            pack(mimi)
            assert mimi.encoder_transformer.native is None
            wav = torch.rand(1, 1, 1920)
            assert torch.equal(mimi.encode(wav), plain.encode(wav))
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("anew", "there")
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native.compiled()
    assert first.is_relative_to(tmp_path) and [first] == list((tmp_path / "moshi-cli").iterdir())
    monkeypatch.setattr(native.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert native.compiled() == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native.library.cache_clear()
    assert native.library() is None  # no folder can be made there


@pytest.mark.usefixtures("there")
def test_split_layers_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.randn(6, 1024), torch.randn(6)
    layer = SplitLinear(weight, bias)
    called: list[int] = []
    multiply = native.product

    def counted(x: Tensor, *rest: object) -> Tensor:
        called.append(len(x))
        return multiply(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "product", counted)
    for rows in (1, 2, 3, 1):
        x = torch.randn(1, 1024, rows).transpose(1, 2)
        close(layer(x), F.linear(x, weight, bias))
    assert called == [1, 2]  # then it was packed for more
