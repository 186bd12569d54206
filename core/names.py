"""Names of tensors in published files <-> ours: one table per model, read in both directions.

A rule is (published, ours). `{x}` stands for one word between dots and is the same on both sides.
Ours may say more about where the tensor lies:
    a[{w}]    entry w of a stacked tensor
    a|flat    a stacked tensor, its entries one below the other
    a + b     two tensors, one below the other
    a#q       the q rows of packed q, k, v; #q and #k of Transformers files are also turned from
              half-split to interleaved rotary order
A `^` after a module marks a variant of it: a transposed convolution, a gated feed-forward, a depth
layer with numbered weight sets. The first list of a model is what `save` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moshi_cli.core.conv import CausalConvTranspose
from moshi_cli.core.depth import DepthLayer
from moshi_cli.core.layers import GatedMlp

Rules = tuple[tuple[str, str], ...]


def stack(published: str, ours: str) -> Rules:
    """The layers of a transformer."""
    p, o = published + ".{l}.", ours + ".{l}."
    return (
        (p + "self_attn.in_proj_weight", o + "attn.qkv.weight"),
        (p + "self_attn.out_proj.weight", o + "attn.out.weight"),
        (p + "norm1.{p}", o + "norm1.{p}"),
        (p + "norm2.{p}", o + "norm2.{p}"),
        (p + "layer_scale_1.scale", o + "scale1.scale"),
        (p + "layer_scale_2.scale", o + "scale2.scale"),
        (p + "gating.linear_in.weight", o + "mlp^.up.weight"),
        (p + "gating.linear_out.weight", o + "mlp^.down.weight"),
        (p + "linear1.weight", o + "mlp.up.weight"),
        (p + "linear2.weight", o + "mlp.down.weight"),
        (p + "norm_cross.{p}", o + "norm_cross.{p}"),
        (p + "cross_attention.in_proj_weight", o + "cross.q.weight + " + o + "cross.kv.weight"),
        (p + "cross_attention.out_proj.weight", o + "cross.out.weight"),
    )


def split_stack(published: str, ours: str) -> Rules:
    """Other spellings of the same: re-saved, fine-tuned and quantised files."""
    p, o = published + ".{l}.", ours + ".{l}."
    return (
        (p + "self_attn.in_projs.0.weight", o + "attn.qkv.weight"),
        (p + "self_attn.in_proj.weight", o + "attn.qkv.weight"),
        (p + "self_attn.out_projs.0.weight", o + "attn.out.weight"),
        (p + "cross_attention.in_projs.0.weight", o + "cross.q.weight + " + o + "cross.kv.weight"),
        (p + "cross_attention.in_proj.weight", o + "cross.q.weight + " + o + "cross.kv.weight"),
        (p + "cross_attention.out_projs.0.weight", o + "cross.out.weight"),
    )


LM: Rules = (
    ("emb.{i}.weight", "emb[{i}]"),
    ("emb.{i}.low_rank.weight", "emb_out.weight[{i}]"),
    ("residual.weight", "residual.weight"),
    ("text_emb.weight", "text_emb.table"),
    ("text_emb.out1.weight", "text_emb.left.weight"),
    ("text_emb.out2.weight", "text_emb.right.weight"),
    ("text_linear.weight", "text_linear.weight"),
    ("out_norm.{p}", "out_norm.{p}"),
    *stack("transformer.layers", "transformer.layers"),
    ("depformer_in.{w}.weight", "depth.inputs.weight[{w}]"),
    ("depformer_text_emb.weight", "depth.text_emb.table"),
    ("depformer_text_emb.low_rank.weight", "depth.text_emb.low_rank.weight"),
    ("depformer_text_emb.out1.weight", "depth.text_emb.left.weight"),
    ("depformer_text_emb.out2.weight", "depth.text_emb.right.weight"),
    ("depformer_emb.{j}.weight", "depth.emb[{j}]"),
    ("depformer_emb.{j}.low_rank.weight", "depth.emb_out.weight[{j}]"),
    ("depformer.layers.{l}.self_attn.in_proj_weight", "depth.layers.{l}^.qkv.weight|flat"),
    ("depformer.layers.{l}.self_attn.out_proj.weight", "depth.layers.{l}^.out.weight|flat"),
    ("depformer.layers.{l}.gating.{w}.linear_in.weight", "depth.layers.{l}^.up.weight[{w}]"),
    ("depformer.layers.{l}.gating.{w}.linear_out.weight", "depth.layers.{l}^.down.weight[{w}]"),
    ("depformer.layers.{l}.norm1.{p}", "depth.layers.{l}^.norm1.{p}"),
    ("depformer.layers.{l}.norm2.{p}", "depth.layers.{l}^.norm2.{p}"),
    ("depformer.layers.{l}.self_attn.in_proj_weight", "depth.layers.{l}.qkv.weight|flat"),
    ("depformer.layers.{l}.self_attn.out_proj.weight", "depth.layers.{l}.out.weight|flat"),
    ("depformer.layers.{l}.gating.linear_in.weight", "depth.layers.{l}.up.weight|flat"),
    ("depformer.layers.{l}.gating.linear_out.weight", "depth.layers.{l}.down.weight|flat"),
    ("depformer.layers.{l}.norm1.{p}", "depth.layers.{l}.norm1.{p}"),
    ("depformer.layers.{l}.norm2.{p}", "depth.layers.{l}.norm2.{p}"),
    ("depformer_norms.{k}.{p}", "depth.norms.{k}.{p}"),
    ("linears.{k}.weight", "depth.heads.weight[{k}]"),
    ("extra_heads.{j}.weight", "extra.{j}.weight"),
    *(
        (f"condition_provider.conditioners.{{c}}.{p}", f"conditioning.conditioners.{{c}}.{o}")
        for p, o in (
            ("embed.weight", "table"),
            ("output_proj.weight", "out.weight"),
            ("learnt_padding", "padding"),
        )
    ),
)
LM_ALSO: Rules = (
    *split_stack("transformer.layers", "transformer.layers"),
    *(
        (f"depformer.layers.{{l}}.self_attn.{p}", f"depth.layers.{{l}}{mark}.{o}")
        for mark in ("^", "")
        for p, o in (
            ("in_projs.{w}.weight", "qkv.weight[{w}]"),
            ("out_projs.{w}.weight", "out.weight[{w}]"),
            ("in_proj.weight", "qkv.weight|flat"),
        )
    ),
)

QUANTIZER = {"rvq_first": "semantic", "rvq_rest": "acoustic"}
MIMI: Rules = (
    *(
        rule
        for side in ("encoder", "decoder")
        for rule in (
            (side + ".model.{i}.conv.conv.{p}", side + ".layers.{i}.{p}"),
            (side + ".model.{i}.convtr.convtr.{p}", side + ".layers.{i}^.{p}"),
            (side + ".model.{i}.block.1.conv.conv.{p}", side + ".layers.{i}.convs.0.{p}"),
            (side + ".model.{i}.block.3.conv.conv.{p}", side + ".layers.{i}.convs.1.{p}"),
            *stack(f"{side}_transformer.transformer.layers", f"{side}_transformer.layers"),
        )
    ),
    ("downsample.conv.conv.conv.weight", "downsample.weight"),
    ("upsample.convtr.convtr.convtr.weight", "upsample^.weight"),
    *(
        rule
        for p, o in QUANTIZER.items()
        for rule in (
            (f"quantizer.{p}.input_proj.weight", f"quantizer.{o}.input_proj.weight"),
            (f"quantizer.{p}.output_proj.weight", f"quantizer.{o}.output_proj.weight"),
            *(
                (f"quantizer.{p}.vq.layers.{{j}}._codebook.{w}", f"quantizer.{o}.layers.{{j}}.{n}")
                for w, n in (
                    ("_initialized", "initialized"),
                    ("cluster_usage", "cluster_usage"),
                    ("embedding_sum", "embedding_sum"),
                )
            ),
        )
    ),
)  # fmt: skip
MIMI_ALSO: Rules = (
    *(
        rule
        for side in ("encoder", "decoder")
        for at in (side + "_transformer.",)
        for rule in split_stack(at + "transformer.layers", at + "layers")
    ),
    *(
        (f"quantizer.{p}.vq.layers.{{j}}._codebook.{was}", f"quantizer.{o}.layers.{{j}}.{now}")
        for p, o in QUANTIZER.items()
        for was, now in (
            ("inited", "initialized"),
            ("cluster_size", "cluster_usage"),
            ("embed_avg", "embedding_sum"),
            ("embed_sum", "embedding_sum"),
        )
    ),
)  # fmt: skip
# Transformers' layout of the codec (repository kyutai/mimi).
MIMI_TRANSFORMERS: Rules = (
    *(
        rule
        for side in ("encoder", "decoder")
        for rule in (
            (side + ".layers.{i}.conv.{p}", side + ".layers.{i}.{p}"),
            (side + ".layers.{i}.conv.{p}", side + ".layers.{i}^.{p}"),
            (side + ".layers.{i}.block.1.conv.{p}", side + ".layers.{i}.convs.0.{p}"),
            (side + ".layers.{i}.block.3.conv.{p}", side + ".layers.{i}.convs.1.{p}"),
            *(
                (f"{side}_transformer.layers.{{l}}.{p}", f"{side}_transformer.layers.{{l}}.{o}")
                for p, o in (
                    ("self_attn.q_proj.weight", "attn.qkv.weight#q"),
                    ("self_attn.k_proj.weight", "attn.qkv.weight#k"),
                    ("self_attn.v_proj.weight", "attn.qkv.weight#v"),
                    ("self_attn.o_proj.weight", "attn.out.weight"),
                    ("input_layernorm.{p}", "norm1.{p}"),
                    ("post_attention_layernorm.{p}", "norm2.{p}"),
                    ("mlp.fc1.weight", "mlp.up.weight"),
                    ("mlp.fc2.weight", "mlp.down.weight"),
                    ("self_attn_layer_scale.scale", "scale1.scale"),
                    ("mlp_layer_scale.scale", "scale2.scale"),
                )
            ),
        )
    ),
    ("downsample.conv.weight", "downsample.weight"),
    ("upsample.conv.weight", "upsample^.weight"),
    *(
        rule
        for o in ("semantic", "acoustic")
        for p in (f"quantizer.{o}_residual_vector_quantizer",)
        for rule in (
            (f"{p}.input_proj.weight", f"quantizer.{o}.input_proj.weight"),
            (f"{p}.output_proj.weight", f"quantizer.{o}.output_proj.weight"),
            *(
                (f"{p}.layers.{{j}}.codebook.{was}", f"quantizer.{o}.layers.{{j}}.{now}")
                for was, now in (
                    ("initialized", "initialized"),
                    ("cluster_usage", "cluster_usage"),
                    ("embed_sum", "embedding_sum"),
                )
            ),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a published tensor lies in a model: one or two of its tensors, or a piece of one."""

    tensors: tuple[str, ...]
    index: int | None = None
    flat: bool = False
    part: str = ""  # "q", "k" or "v" of packed rows
    heads: int = 1

    @property
    def cells(self) -> list[tuple[str, int | str | None]]:
        """What is filled: (tensor, index or part; None for all of it)."""
        return [(name, self.part or self.index) for name in self.tensors]

    def shape(self, state: dict[str, Tensor]) -> tuple[int, ...]:
        """The published shape."""
        first = tuple(state[self.tensors[0]].shape)
        if self.index is not None:
            return first[1:]
        if self.flat:
            return (first[0] * first[1], *first[2:])
        if self.part:
            return (first[0] // 3, *first[1:])
        return (sum(state[name].shape[0] for name in self.tensors), *first[1:]) if first else ()

    def views(self, state: dict[str, Tensor]) -> list[Tensor]:
        """Views into the model that hold it, rows in order."""
        found = [state[name] for name in self.tensors]
        if self.index is not None:
            return [found[0][self.index]]
        if self.flat:
            return [found[0].flatten(0, 1)]
        return [found[0].chunk(3)["qkv".index(self.part)]] if self.part else found

    def write(self, state: dict[str, Tensor], value: Tensor, add: bool = False) -> None:
        """Copy (or add) a published tensor into the model."""
        if self.part in ("q", "k"):
            value = interleaved(value, self.heads)
        rows = 0
        for view in self.views(state):
            piece = value[rows : rows + len(view)] if view.dim() else value
            rows += len(view) if view.dim() else 0
            piece = piece.to(view.device)
            view.copy_(view.float() + piece.float() if add else piece)

    def read(self, state: dict[str, Tensor]) -> Tensor:
        """The published tensor, a copy."""
        views = self.views(state)
        value = torch.cat(views) if len(views) > 1 else views[0].clone()
        return half_split(value, self.heads) if self.part in ("q", "k") else value


def interleaved(x: Tensor, heads: int) -> Tensor:
    """Rows of each head from (even half, odd half) to (0, 1, 2, …). x [D, in]"""
    return x.view(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)


def half_split(x: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return x.view(heads, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


def spelled(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, name with ^ after every marked module) of each tensor in the model's state."""
    marks = []
    for path, module in model.named_modules():
        numbered = isinstance(module, DepthLayer) and module.numbered
        if isinstance(module, CausalConvTranspose | GatedMlp) or numbered:
            marks.append(path + ".")
    for name in model.state_dict():
        marked = name
        for path in marks:
            if name.startswith(path):
                marked = path[:-1] + "^." + name[len(path) :]
        yield name, marked


def expand(rules: Iterable[tuple[str, str]], model: nn.Module, heads: int = 1) -> dict[str, Place]:
    """All published names that `rules` give for a model, in the order of its tensors."""
    names = {marked: name for name, marked in spelled(model)}
    state = model.state_dict()
    compiled = []
    for published, ours in rules:
        target, _, part = ours.partition("#")
        target, _, flat = target.partition("|")
        target, _, second = target.partition(" + ")
        target, _, stacked = target.partition("[")
        wanted = re.sub(r"\\{(\w)\\}", r"(?P<\1>[^.^]+)", re.escape(target))
        compiled.append((re.compile(wanted), published, stacked[1:2], flat, second, part))
    found: dict[str, Place] = {}
    for marked, name in names.items():
        for pattern, published, stacked, flat, second, part in compiled:
            if not (match := pattern.fullmatch(marked)):
                continue
            words = match.groupdict()
            also = (names[second.format(**words)],) if second else ()
            for w in range(state[name].shape[0]) if stacked else [None]:
                entry = words if w is None else {**words, stacked: str(w)}
                place = Place((name, *also), w, bool(flat), part, heads)
                found.setdefault(published.format(**entry), place)
    return found
