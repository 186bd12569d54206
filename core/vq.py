"""Split residual vector quantiser of Mimi (paper §3.3.2): lookup, and EMA codebooks to train it.

Two branches see the *same* latent: a plain VQ for the semantic codebook and a residual VQ for the
acoustic ones. Each has its own 1×1 projections; the branch outputs are added. Codebooks are stored
as running sums, centroid = embedding_sum / max(cluster_usage, 1e-5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_cli.core import native
from moshi_cli.core.config import QuantizerConfig
from moshi_cli.core.layers import project, quick

EPS = 1e-5  # floor of a cluster's usage
FITTED = 1 << 14  # vectors that are assigned at a time: 128 MB
SEEN = 100  # vectors per entry that `refine` looks at
REFINED = 3  # rounds of `refine` after codebooks were fitted one by one
SETS = 128  # of entries, of which the nearest is looked for first
SEARCHED = 256  # frames that are searched at a time: 32 MB with 16 paths


def together() -> bool:
    """Whether several processes train this model."""
    return dist.is_available() and dist.is_initialized()


class Codebook(nn.Module):
    """C centroids of width D, learnt by exponential moving averages."""

    embedding_sum: Tensor  # [C, D]
    cluster_usage: Tensor  # [C]
    initialized: Tensor  # [1]
    centroids: Tensor  # [C, D], derived
    half_norm: Tensor  # [C], ‖c‖² / 2, derived

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("embedding_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("initialized", torch.zeros(1))
        self.register_buffer("centroids", torch.zeros(size, dim), persistent=False)
        self.register_buffer("half_norm", torch.zeros(size), persistent=False)

    def refresh(self) -> None:
        """Derive the centroids; call after the sums changed (loading, training)."""
        self.centroids = self.embedding_sum / self.cluster_usage.clamp(min=EPS)[:, None]
        self.half_norm = self.centroids.square().sum(-1) / 2

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> index of the nearest centroid [...]."""
        if quick(x, x.numel() // x.shape[-1]):  # the same in fewer calls
            rows = x.reshape(-1, x.shape[-1])
            far = torch.addmm(self.half_norm[:, None], self.centroids, rows.t(), alpha=-1)
            return far.argmin(0).view(x.shape[:-1])
        return (self.half_norm - project(x, self.centroids)).argmin(-1)

    def encode_many(self, x: Tensor) -> Tensor:
        """x [N, D] -> codes [N], some at a time: N may be large."""
        return torch.cat([self.encode(y) for y in x.split(FITTED)])

    def decode(self, codes: Tensor) -> Tensor:
        """codes [...] -> centroids [..., D]."""
        return F.embedding(codes, self.centroids)

    @torch.no_grad()
    def fit(
        self, x: Tensor, rounds: int, generator: torch.Generator, start: Tensor | None = None
    ) -> None:
        """k-means on vectors x [N, D], N ≥ C: the codebook's first values, all entries in use.
        start [C, D]: where entries begin; None: at vectors of x."""
        size = len(self.cluster_usage)
        assert len(x) >= size, (x.shape, size)
        if start is None:
            start = x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]
        self.embedding_sum.copy_(start)
        self.cluster_usage.fill_(1.0)
        self.refresh()
        for _ in range(rounds):
            counts, sums = self.assign(x, self.encode_many(x))
            empty = counts == 0
            pick = torch.randint(len(x), (size,), generator=generator).to(x.device)
            self.embedding_sum.copy_(torch.where(empty[:, None], x[pick], sums))
            self.cluster_usage.copy_(counts.clamp(min=1))
            self.refresh()
        share = self.cluster_usage.sum() / size  # usage counts hits per step from here on: mean 1
        self.embedding_sum /= share
        self.cluster_usage /= share
        self.initialized.fill_(1.0)
        if together():
            dist.broadcast(self.embedding_sum, 0)
            dist.broadcast(self.cluster_usage, 0)
        self.refresh()

    def assign(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D], codes [N] -> hits [C] and sums [C, D] per entry."""
        hits = torch.bincount(codes, minlength=len(self.cluster_usage)).to(x)
        return hits, torch.zeros_like(self.embedding_sum).index_add_(0, codes, x)

    @torch.no_grad()
    def learn(
        self, x: Tensor, codes: Tensor, decay: float, min_usage: float, generator: torch.Generator
    ) -> None:
        """One EMA step on vectors x [N, D] with their codes [N]; dead entries restart on data.

        Hits are counted relative to an even spread (mean usage 1); an entry is dead when its usage
        falls below `min_usage`.
        """
        size = len(self.cluster_usage)
        hits, sums = self.assign(x, codes)
        even = size / len(x)
        if together():  # every process learns from the vectors of all
            for total in (hits, sums):
                dist.all_reduce(total)
            even /= dist.get_world_size()
        self.cluster_usage.mul_(decay).add_(hits, alpha=(1 - decay) * even)
        self.embedding_sum.mul_(decay).add_(sums, alpha=(1 - decay) * even)
        pick = torch.randint(len(x), (size,), generator=generator).to(x.device)
        dead = self.cluster_usage < min_usage
        if dead.any():
            fresh = x[pick]
            if together():
                dist.broadcast(fresh, 0)
            self.embedding_sum.copy_(torch.where(dead[:, None], fresh, self.embedding_sum))
        self.cluster_usage.masked_fill_(dead, 1.0)
        self.refresh()


@dataclass
class Quantized:
    """What a branch returns in training. Shapes [B, D, T] with D the latent width."""

    latent: Tensor  # straight-through output, in the latent space
    codes: Tensor  # [B, Q, T]
    commitment: Tensor  # scalar


class ResidualVq(nn.Module):
    """1×1 in, `codebooks` rounds of nearest centroid and subtract, sum, 1×1 out."""

    native: native.Books | None = None  # if packed: for single frames

    def __init__(self, latent: int, config: QuantizerConfig, codebooks: int):
        super().__init__()
        self.input_proj = nn.Conv1d(latent, config.dim, 1, bias=False)
        self.output_proj = nn.Conv1d(config.dim, latent, 1, bias=False)
        self.layers = nn.ModuleList(Codebook(config.size, config.dim) for _ in range(codebooks))
        self.beam = config.beam

    @property
    def books(self) -> list[Codebook]:
        """The codebooks in order."""
        return cast("list[Codebook]", list(self.layers))

    def encode(self, x: Tensor, count: int) -> Tensor:
        """x [B, D, T] -> codes [B, count, T]."""
        r = self.input_proj(x).transpose(1, 2)  # [B, T, dim]
        single = len(r) == r.shape[1] == 1 and quick(r, 2)
        if single and self.native is not None:
            return self.native.nearest(r[0, 0], count)[None, :, None]
        if self.beam > 1:
            return self.paths(r, count).transpose(1, 2)
        if single:
            r = r.repeat(1, 2, 1)  # at once, rather than in every product
        codes = []
        for layer in self.books[:count]:
            codes.append(layer.encode(r))
            r = r - layer.decode(codes[-1])
        found = torch.stack(codes, 1)
        return found[..., :1] if single else found

    def paths(self, x: Tensor, count: int) -> Tensor:
        """x [B, T, dim] -> codes [B, T, count] by `search`, some frames at a time."""
        rows = [self.search(part, count) for part in x.flatten(0, 1).split(SEARCHED)]
        return torch.cat(rows).view(*x.shape[:2], count)

    def search(self, x: Tensor, count: int) -> Tensor:
        """x [N, dim] -> codes [N, count]: of `beam` paths kept at each codebook the nearest one.

        A first entry that is not the nearest may leave what later ones tell better.
        """
        left, paths = x[:, None], x.new_empty(len(x), 1, 0, dtype=torch.long)  # [N, m, dim or k]
        for layer in self.books[:count]:
            N, m, size = len(x), left.shape[1], len(layer.centroids)
            half = left.square().sum(-1, keepdim=True) / 2  # [N, m, 1]
            far = torch.addmm(layer.half_norm, left.flatten(0, 1), layer.centroids.t(), alpha=-1)
            far = far.view(N, m, size)  # [N, m, C], less half
            # The nearest of all lie in the sets of entries whose nearest are nearest.
            sets = SETS if size % SETS == 0 else size
            least = (far.view(N, m, size // sets, sets).amin(2) + half).flatten(1)  # [N, m · sets]
            first = least.topk(min(self.beam, least.shape[1]), largest=False, sorted=False).indices
            path, start = first[..., None] // sets, first[..., None] % sets  # [N, b, 1]
            some = path * size + start + torch.arange(0, size, sets, device=x.device)  # [N, b, n]
            found = far.flatten(1).gather(1, some.flatten(1)).view(some.shape)
            found = (found + half[..., 0].gather(1, path[..., 0])[..., None]).flatten(1)
            near = found.topk(min(self.beam, found.shape[1]), largest=False).indices
            at = some.flatten(1).gather(1, near)
            entry, path = at % size, at // size  # [N, beam]
            paths = paths.gather(1, path[..., None].expand(-1, -1, paths.shape[2]))
            paths = torch.cat([paths, entry[..., None]], 2)
            left = left.gather(1, path[..., None].expand(-1, -1, left.shape[2]))
            left = left - layer.decode(entry)
        return paths[:, 0]  # sorted

    def total(self, codes: Tensor) -> Tensor:
        """codes [B, n, T], n ≤ codebooks -> sum of their centroids [B, T, dim]."""
        z = sum(layer.decode(c) for layer, c in zip(self.books, codes.unbind(1), strict=False))
        assert isinstance(z, Tensor)
        return z

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, n, T], n ≤ codebooks -> latent [B, D, T]."""
        return self.output_proj(self.total(codes).transpose(1, 2))

    def residual(self, x: Tensor, codes: Tensor) -> Tensor:
        """x [B, D, T] and its codes [B, n, T] -> what they leave of its projection [B, dim, T]."""
        return self.input_proj(x) - self.total(codes).transpose(1, 2)

    def train_step(
        self,
        x: Tensor,
        quantize: Tensor,
        counts: Tensor,
        decay: float,
        min_usage: float,
        generator: torch.Generator,
    ) -> Quantized:
        """x [B, D, T]; quantize bool[B]; counts long[B]: codebooks used per item (dropout).

        In training mode all levels learn from their residuals. The straight-through output uses
        `counts` levels, or the unquantised projection where `quantize` is False. Codebooks that
        were not fitted yet (`fit`) quantise nothing.
        """
        with torch.autocast(x.device.type, enabled=False):
            z = F.conv1d(x.float(), self.input_proj.weight).transpose(1, 2)  # [B, T, dim]
            straight, codes, loss = z, [], z.new_zeros(())
            if self.fitted:
                total, r = torch.zeros_like(z), z.detach()
                for level, layer in enumerate(self.books):
                    codes.append(layer.encode(r))
                    near = layer.decode(codes[-1])
                    if self.training:
                        layer.learn(
                            r.flatten(0, 1), codes[-1].flatten(), decay, min_usage, generator
                        )
                    used = (level < counts)[:, None, None]
                    total = total + near * used
                    loss = loss + ((z - total).square() * used).mean()  # pulls z towards its sum
                    r = r - near
                loss = loss / (z.detach().var() + EPS)  # whatever the latent's scale
                straight = z + ((total - z) * quantize[:, None, None]).detach()
            else:
                codes = [torch.zeros(z.shape[:2], dtype=torch.long, device=z.device)] * len(
                    self.layers
                )
            latent = F.conv1d(straight.transpose(1, 2), self.output_proj.weight)
        return Quantized(latent, torch.stack(codes, 1), loss / len(self.layers))

    @property
    def fitted(self) -> bool:
        """Whether the codebooks have values."""
        return bool(self.books[0].initialized.item())

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        rounds: int,
        generator: torch.Generator,
        starts: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Fit all levels to latents x [N, D], each to what the ones before it leave, from `starts`
        (see `Codebook.fit`)."""
        r = self.input_proj(x[..., None])[..., 0]  # [N, dim]
        z = r
        for layer, start in zip(self.books, starts or [None] * len(self.books), strict=True):
            layer.fit(r, rounds, generator, start)
            r = r - layer.decode(layer.encode_many(r))
        for _ in range(REFINED if self.beam > 1 else 0):
            self.refine(z[: SEEN * len(layer.centroids)])

    def refine(self, x: Tensor) -> None:
        """Move entries to the mean of what the other codebooks leave them of x [N, dim], where
        `search` says which entries those are."""
        codes = self.paths(x[None], len(self.books))[0].unbind(1)
        total = x.new_zeros(())
        for layer, code in zip(self.books, codes, strict=True):
            total = total + layer.decode(code)
        for layer, code in zip(self.books, codes, strict=True):
            mine = layer.decode(code)
            counts, sums = layer.assign(x - total + mine, code)
            if together():
                dist.broadcast(counts, 0)
                dist.broadcast(sums, 0)
            mean = torch.where(
                counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], layer.centroids
            )
            layer.embedding_sum.copy_(mean * layer.cluster_usage[:, None])
            layer.refresh()
            total = total - mine + layer.decode(code)


class SplitVq(nn.Module):
    """Semantic VQ and acoustic residual VQ side by side. codes [B, Q, T]: semantic first."""

    def __init__(self, latent: int, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.semantic = ResidualVq(latent, config, config.semantic)
        self.acoustic = ResidualVq(latent, config, config.codebooks - config.semantic)
        self.active = config.codebooks  # codebooks that encode() gives

    def projections(self) -> list[nn.Conv1d]:
        """The 1×1 convolutions into and out of the branches."""
        branches = (self.semantic, self.acoustic)
        return [p for b in branches for p in (b.input_proj, b.output_proj)]

    @property
    def fitted(self) -> bool:
        """Whether the codebooks have values."""
        return self.semantic.fitted

    def reset(self) -> None:
        """Forget the codebooks: nothing is quantised until `fit`."""
        for module in self.modules():
            if isinstance(module, Codebook):
                module.initialized.zero_()

    def refresh(self) -> None:
        """Derive all centroids from the stored sums."""
        for module in self.modules():
            if isinstance(module, Codebook):
                module.refresh()

    def fit(self, latents: Tensor, *, rounds: int = 10, generator: torch.Generator) -> None:
        """First values of all codebooks by k-means. latents [N, D], N ≥ C, best ≥ 8 C."""
        self.semantic.fit(latents, rounds, generator)
        self.acoustic.fit(latents, rounds, generator)

    def encode(self, x: Tensor) -> Tensor:
        """latent [B, D, T] -> codes [B, active, T]."""
        first = self.config.semantic
        codes = self.semantic.encode(x, min(first, self.active))
        if self.active <= first:
            return codes
        return torch.cat([codes, self.acoustic.encode(x, self.active - first)], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, n, T], any n ≤ Q -> latent [B, D, T]."""
        first = self.config.semantic
        latent = self.semantic.decode(codes[:, :first])
        if codes.shape[1] > first:
            latent = latent + self.acoustic.decode(codes[:, first:])
        return latent

    def residual(self, x: Tensor, codes: Tensor) -> Tensor:
        """latent [B, D, T] and its codes [B, n, T] -> what they leave of it [B, 2 · dim, T], of the
        semantic branch and then of the acoustic one (zeros without acoustic codes)."""
        first = self.config.semantic
        left = self.semantic.residual(x, codes[:, :first])
        if codes.shape[1] <= first:
            return torch.cat([left, torch.zeros_like(left)], 1)
        return torch.cat([left, self.acoustic.residual(x, codes[:, first:])], 1)
