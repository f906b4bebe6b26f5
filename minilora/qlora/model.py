"""Qwen2.5 in plain PyTorch: ids of a packed micro-batch in, hidden states out.

    hidden = embed_tokens(input_ids)                                   (T, C)
    for each layer:
        hidden += o_proj(attention(rotary(q), rotary(k), v))           q, k, v from input_layernorm(hidden)
        hidden += down_proj(silu(gate_proj(n)) * up_proj(n))           n = post_attention_layernorm(hidden)
    norm(hidden)                                                       (S, C), for `loss.py` to score

Behind the last layer only the S supervised rows are read. So it computes keys and values of all rows, which
these look at, and all else of the S rows alone: with 24 layers and 2 answer tokens in a hundred 4 % less work.

Sizes, for the whole package:
    T  rows of a packed micro-batch      C  hidden_size            R  LoRA rank
    H  query heads                       K  key/value heads        P  rows of the shared prefix
    D  head size                         F  intermediate_size      S  supervised rows
    V  vocabulary rows                   G  H / K

Activations have neither batch axis nor padding. Attribute names are the keys of a Hugging Face checkpoint,
so `load.py` needs no table of names. Linear layers are called through `lora.project`, with or without an adapter.
The head is not part of the forward pass: `head_weight` goes to the loss together with the supervised rows.

Source: arXiv 2412.15115 and, for rounding, transformers' modeling_qwen2.py, with which tests/parity agrees.
Left out, with an error that says so: sliding-window attention, scaled rotary embeddings, mixture of experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minilora.qlora import ops
from minilora.qlora.batch import MicroBatch, SegmentGroup, pack_segments
from minilora.qlora.checkpointing import checkpoint_layer
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.lora import Again, project
from minilora.qlora.ops import HeadGroup


@dataclass(frozen=True)
class Qwen2Config:
    """The fields of config.json that the model reads, under their own names; `weights/hf_config.py` checks them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None

    @property
    def head_dim(self) -> int:
        """D: Qwen2.5 always splits hidden_size evenly."""
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight (C,)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        return ops.rms_norm(x, self.weight, self.eps)

    def again(self, x: torch.Tensor) -> Again:
        """How `forward(x)` is made once more."""
        return Again(partial(ops.rms_norm, eps=self.eps), (x, self.weight))


class Embedding(nn.Embedding):
    """PyTorch's, but for first values on the meta device: there are none, and to draw them it imports its compiler."""

    def reset_parameters(self) -> None:
        """Draws first values where there is memory for them."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Grouped-query attention; q, k and v have biases in Qwen2.5, o has none."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        again: Again,
        cos: torch.Tensor,
        sin: torch.Tensor,
        groups: tuple[HeadGroup, ...] | None,
        rows: torch.Tensor | None = None,
        past: KVCache | None = None,
    ) -> torch.Tensor:
        """(T, C) -> (T, C), or (S, C) if only `rows` (S,) ask, by the micro-batch's `last_groups`.

        Without groups it is one row that asks, the last, and it looks at all.
        """
        if rows is None:
            q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), again)
            q = ops.rotary(self._heads(q), cos, sin)
        else:
            k, v = project(x, (self.k_proj, self.v_proj), again)
            (q,) = project(x.index_select(0, rows), (self.q_proj,))
            q = ops.rotary(self._heads(q), cos.index_select(0, rows), sin.index_select(0, rows))
        keys, values = ops.rotary(self._heads(k), cos, sin), self._heads(v)
        if past is not None:
            keys, values = past.before(keys, values)
        mixed = ops.decode_attention(q, keys, values) if groups is None else ops.attention(q, keys, values, groups)
        return project(mixed.view(q.shape[0], -1), (self.o_proj,))[0]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.head_dim)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, again: Again) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        gate, up = project(x, (self.gate_proj, self.up_proj), again)
        return project(ops.swiglu(gate, up), (self.down_proj,), Again(ops.swiglu, (gate, up)))[0]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        groups: tuple[HeadGroup, ...] | None,
        rows: torch.Tensor | None = None,
        past: KVCache | None = None,
    ) -> torch.Tensor:
        """(T, C) -> (T, C), or (S, C) of `rows` alone."""
        norm = self.input_layernorm
        mixed = self.self_attn(norm(hidden), norm.again(hidden), cos, sin, groups, rows, past)
        hidden = mixed + (hidden if rows is None else hidden.index_select(0, rows))
        norm = self.post_attention_layernorm
        return hidden + self.mlp(norm(hidden), norm.again(hidden))


class Qwen2Model(nn.Module):
    """Embedding, layers and last norm: what a checkpoint calls `model`.

    Attributes:
        gradient_checkpointing: a layer keeps its input alone and runs again in backward.
        offload_checkpoints: on a GPU, those inputs wait in the computer's memory.
    """

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.offload_checkpoints = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        groups: tuple[SegmentGroup, ...] | None,
        last_groups: tuple[SegmentGroup, ...] | None = None,
        rows: torch.Tensor | None = None,
        past: Sequence[KVCache] | None = None,
    ) -> torch.Tensor:
        """(T,) ids -> hidden states after the last norm: (T, C), or (S, C) of `rows` alone, by `last_groups`.

        Where groups are None, a single row asks, the last one: all of a pass over one id, or `rows` of the last layer.
        """
        hidden = F.embedding(input_ids, self.embed_tokens.weight)
        cos, sin = ops.rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads)
        seen = None if groups is None else ops.split_heads(groups, *heads, len(hidden))
        last_seen = seen
        if rows is not None:
            last_seen = None if last_groups is None else ops.split_heads(last_groups, *heads, len(rows))
        pasts: Sequence[KVCache | None] = [None] * len(self.layers) if past is None else past
        for layer, layer_past in zip(self.layers[:-1], pasts, strict=False):
            hidden = self._run(layer, hidden, cos, sin, seen, None, layer_past)
        hidden = self._run(self.layers[-1], hidden, cos, sin, last_seen, rows, pasts[-1])
        return self.norm(hidden)

    def _run(self, layer: nn.Module, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """`layer(hidden, ...)`, its activations kept for backward or computed again there."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint_layer(layer, hidden, arguments, self.offload_checkpoints)
        output: torch.Tensor = layer(hidden, *arguments)
        return output


class Qwen2ForCausalLM(nn.Module):
    """The model and, where it is not the embedding itself, the head."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, C): the embedding where the two are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, batch: MicroBatch, past: Sequence[KVCache] | None = None) -> torch.Tensor:
        """Hidden states of the rows that predict a supervised token: (S, C) compute dtype.

        Args:
            batch: packed; with a `past`, by `pack(..., cached_prefix=rows of the past)`.
            past: by layer, of the rows that stand before the batch's.
        """
        hidden: torch.Tensor = self.model(
            batch.input_ids, batch.position_ids, batch.groups, batch.last_groups, batch.supervised_positions, past
        )
        return hidden

    def build_prefix_cache(self, input_ids: torch.Tensor) -> list[KVCache]:
        """Keys and values, by layer, of (P,) ids that all later batches begin with."""
        past = [KVCache() for _ in self.model.layers]
        self.prefill(input_ids, past)
        for layer in past:
            layer.growing = False
        return past

    def prefill(self, input_ids: torch.Tensor, past: Sequence[KVCache]) -> torch.Tensor:
        """Runs (T,) ids behind the rows of `past`, which they join.

        Returns:
            Hidden state (1, C) compute dtype of the last one, which predicts what comes next.
        """
        start, count, device = past[0].rows, len(input_ids), input_ids.device
        positions = torch.arange(start, start + count, device=device)
        if count == 1:
            hidden: torch.Tensor = self.model(input_ids, positions, None, past=past)
            return hidden
        groups = tuple(group.to(device) for group in pack_segments([count], start))
        last = torch.arange(count - 1, count, device=device)
        hidden = self.model(input_ids, positions, groups, rows=last, past=past)
        return hidden
