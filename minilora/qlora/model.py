"""Qwen2.5 in plain PyTorch: ids of a packed micro-batch in, hidden states out.

    hidden = embed_tokens(input_ids)                                   (T, C)
    for each layer:
        hidden += o_proj(attention(rotary(q), rotary(k), v))           q, k, v from input_layernorm(hidden)
        hidden += down_proj(silu(gate_proj(n)) * up_proj(n))           n = post_attention_layernorm(hidden)
    norm(hidden)                                                       (S, C), for `loss.py` to score

Behind the last layer only the S supervised positions are read. So it computes keys and values of all tokens, which
these attend to, and all else at the S positions only: with 24 layers and 2 answer tokens in a hundred 4 % less work.

Sizes, for the whole package:
    T  tokens of a packed micro-batch    C  hidden_size            R  LoRA rank
    H  query heads                       K  key/value heads        P  tokens of the shared prefix
    D  head size                         F  intermediate_size      S  supervised positions
    V  vocab_size                        G  H / K

Activations have neither batch axis nor padding. Attribute names are the keys of a Hugging Face checkpoint, so
`weights/load.py` needs no table of names. Linear layers are called through `lora.linear_layers`, with or without an
adapter. The head is not part of the forward pass: `head_weight` goes to the loss together with the hidden states.

Source: arXiv 2412.15115 and, for rounding, transformers' modeling_qwen2.py, with which tests/parity agrees.
Left out, with an error that says so: sliding-window attention, scaled rotary embeddings, mixture of experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minilora.qlora import ops
from minilora.qlora.attention import AttentionGroup, attention, decode_attention, split_heads
from minilora.qlora.batch import MicroBatch, SegmentGroup, pack_segments
from minilora.qlora.checkpointing import checkpoint_layer
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.lora import Recompute, linear_layers


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
        return ops.rms_norm(x, self.weight, self.eps)

    def recomputable(self, x: torch.Tensor) -> tuple[torch.Tensor, Recompute]:
        """The same, and how it is computed in backward."""
        y, inverse_rms = ops.rms_norm_and_scale(x, self.weight, self.eps)
        return y, Recompute(partial(ops.recompute_rms_norm, eps=self.eps), (x, self.weight, inverse_rms))


class Embedding(nn.Embedding):
    """PyTorch's, except that on the meta device no first values are drawn, for which it would import its compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


@dataclass(frozen=True)
class LayerInputs:
    """What a layer is given beside the hidden states."""

    cos: torch.Tensor  # (T, 1, D) from `ops.rotary_table`, as `sin`
    sin: torch.Tensor
    groups: tuple[AttentionGroup, ...] | None  # which queries attend to which keys; None: one, the last, to all
    positions: torch.Tensor | None = None  # (S,) int64, where queries and all that follows are needed; None: all T
    kv_cache: KVCache | None = None  # of the tokens before these
    is_recomputed: bool = False  # only a backward pass follows: what the layer returns is not read


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

    def forward(self, x: torch.Tensor, recompute: Recompute, inputs: LayerInputs) -> torch.Tensor:
        """(T, C) -> (T, C), or (S, C) at `inputs.positions`."""
        cos, sin, positions = inputs.cos, inputs.sin, inputs.positions
        if positions is None:
            q, k, v = linear_layers(x, (self.q_proj, self.k_proj, self.v_proj), recompute)
            q = ops.rotary(self._heads(q), cos, sin)
        else:
            k, v = linear_layers(x, (self.k_proj, self.v_proj), recompute)
            (q,) = linear_layers(x.index_select(0, positions), (self.q_proj,))
            q = ops.rotary(self._heads(q), cos.index_select(0, positions), sin.index_select(0, positions))
        keys, values = ops.rotary(self._heads(k), cos, sin), self._heads(v)
        if inputs.kv_cache is not None:
            keys, values = inputs.kv_cache.append(keys, values)
        if inputs.groups is None:
            mixed = decode_attention(q, keys, values)
        else:
            mixed = attention(q, keys, values, inputs.groups)
        return linear_layers(mixed.reshape(q.shape[0], -1), (self.o_proj,))[0]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.head_dim)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, recompute: Recompute, is_read: bool) -> torch.Tensor:
        """(T, C) -> (T, C), of any values unless they are read."""
        gate, up = linear_layers(x, (self.gate_proj, self.up_proj), recompute)
        h = ops.swiglu(gate, up)
        return linear_layers(h, (self.down_proj,), Recompute(ops.swiglu, (gate, up)), is_read=is_read)[0]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """(T, C) -> (T, C), or (S, C) at `inputs.positions`."""
        stream = hidden if inputs.positions is None else hidden.index_select(0, inputs.positions)
        hidden = stream + self.self_attn(*self.input_layernorm.recomputable(hidden), inputs)
        return hidden + self.mlp(*self.post_attention_layernorm.recomputable(hidden), not inputs.is_recomputed)


class Qwen2Model(nn.Module):
    """Embedding, layers and last norm: what a checkpoint calls `model`."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # a layer keeps only its input and is recomputed in backward
        self.offload_checkpoints = False  # on a GPU, those inputs wait in the computer's memory
        self.flash_attention: tuple[torch.device, torch.dtype] | None = None  # where it is known to be there, and right
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        groups: tuple[SegmentGroup, ...] | None,
        last_groups: tuple[SegmentGroup, ...] | None = None,
        positions: torch.Tensor | None = None,
        kv_cache: Sequence[KVCache] | None = None,
    ) -> torch.Tensor:
        """(T,) ids -> hidden states after the last norm: (T, C), or (S, C) at `positions`, by `last_groups`.

        Where groups are None there is one query, the last token: of a pass over one id, or of the last layer.
        """
        hidden = F.embedding(input_ids, self.embed_tokens.weight)
        cos, sin = ops.rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        split = partial(split_heads, heads=heads, kv_heads=kv_heads, like=hidden)
        flash = self.flash_attention == (hidden.device, hidden.dtype)
        seen = None if groups is None else split(groups, num_queries=len(hidden), flash=flash)
        last_seen = seen
        if positions is not None:
            last_seen = None if last_groups is None else split(last_groups, num_queries=len(positions))
        caches: Sequence[KVCache | None] = [None] * len(self.layers) if kv_cache is None else kv_cache
        inputs = [LayerInputs(cos, sin, seen, kv_cache=cache) for cache in caches]
        inputs[-1] = LayerInputs(cos, sin, last_seen, positions, kv_cache=caches[-1])
        for layer, given in zip(self.layers, inputs, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint_layer(layer, hidden, given, self.offload_checkpoints)
            else:
                hidden = layer(hidden, given)
        return self.norm(hidden)


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
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, batch: MicroBatch, kv_cache: Sequence[KVCache] | None = None) -> torch.Tensor:
        """Hidden states that predict a supervised token: (S, C) compute dtype.

        With a KV cache, one for each layer, the batch is from `pack(..., cached_prefix=tokens in the cache)`.
        """
        hidden: torch.Tensor = self.model(
            batch.input_ids,
            batch.position_ids,
            batch.groups,
            last_groups=batch.last_groups,
            positions=batch.supervised_positions,
            kv_cache=kv_cache,
        )
        return hidden

    def build_prefix_cache(self, input_ids: torch.Tensor) -> list[KVCache]:
        """The KV cache, by layer, of (P,) ids that all later batches begin with; it does not grow any more."""
        kv_cache = [KVCache() for _ in self.model.layers]
        self.prefill(input_ids, kv_cache)
        for layer in kv_cache:
            layer.is_frozen = True
        return kv_cache

    def prefill(self, input_ids: torch.Tensor, kv_cache: Sequence[KVCache]) -> torch.Tensor:
        """Hidden state (1, C) that predicts what follows (T,) ids, appended to the KV cache; T = 1 is a decode step."""
        start, count, device = kv_cache[0].length, len(input_ids), input_ids.device
        position_ids = torch.arange(start, start + count, device=device)
        groups = last = None
        if count > 1:
            groups, last = pack_segments([count], start), torch.arange(count - 1, count, device=device)
        hidden: torch.Tensor = self.model(input_ids, position_ids, groups, positions=last, kv_cache=kv_cache)
        return hidden
