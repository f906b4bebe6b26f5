"""Qwen2.5 in plain PyTorch: ids of a packed micro-batch in, hidden states out.

    hidden = embed_tokens(input_ids)                                   (T, C)
    for each layer:
        hidden += o_proj(attention(rotary(q), rotary(k), v))           q, k, v from input_layernorm(hidden)
        hidden += down_proj(silu(gate_proj(n)) * up_proj(n))           n = post_attention_layernorm(hidden)
    norm(hidden)                                                       (T, C), for `loss.py` to score

Sizes, for the whole package:
    T  rows of a packed micro-batch      C  hidden_size            R  LoRA rank
    H  query heads                       K  key/value heads        P  rows of the shared prefix
    D  head size                         F  intermediate_size      S  supervised rows
    V  vocabulary rows                   G  H / K

Activations have neither batch axis nor padding. Attribute names are the keys of a Hugging Face checkpoint,
so `load.py` needs no table of names. The head is not part of the forward pass: `head_weight` goes to the
loss together with the few rows that are supervised.

Source: arXiv 2412.15115 and, for rounding, transformers' modeling_qwen2.py, with which tests/parity agrees.
Left out, with an error that says so: sliding-window attention, scaled rotary embeddings, mixture of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minilora import ops
from minilora.batch import MicroBatch, SegmentGroup
from minilora.errors import UserError


@dataclass(frozen=True)
class Qwen2Config:
    """The fields of config.json that the model reads, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """D: Qwen2.5 always splits hidden_size evenly."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "config.json") -> "Qwen2Config":
        """Reads either dialect: `rope_theta` at the top, or in `rope_parameters` as transformers 5 writes it.

        Nothing has a default but what Hugging Face's own files may leave out (tied: false).

        Raises:
            UserError: another architecture, a missing field, or something that the model does not do.
        """
        if content.get("model_type") != "qwen2":
            raise UserError(
                f"{where}: model_type is {content.get('model_type')!r}, expected 'qwen2'; "
                "minilora trains the dense Qwen2.5 models"
            )
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "use_sliding_window": (content.get("use_sliding_window", False), False),
            "hidden_act": (content.get("hidden_act", "silu"), "silu"),
            "rope scaling": (rope_type, "default"),
        }
        for name, (found, expected) in unsupported.items():
            if found != expected:
                raise UserError(f"{where}: {name} is {found!r}, only {expected!r} is supported; use a model without it")
        if set(content.get("layer_types") or ["full_attention"]) != {"full_attention"}:
            raise UserError(f"{where}: layer_types has sliding attention, which is not supported; use another model")
        found_values = {"tie_word_embeddings": False, "rope_theta": rope.get("rope_theta"), **content}
        missing = [f.name for f in fields(cls) if found_values.get(f.name) is None]
        if missing:
            raise UserError(f"{where}: has no {', '.join(missing)}; download config.json of the model again")
        config = cls(**{f.name: found_values[f.name] for f in fields(cls)})
        if config.hidden_size % config.num_attention_heads or config.head_dim % 2:
            raise UserError(
                f"{where}: hidden_size {config.hidden_size} does not divide into "
                f"{config.num_attention_heads} heads of even size; the file is not a Qwen2.5 configuration"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"{where}: {config.num_attention_heads} query heads cannot share "
                f"{config.num_key_value_heads} key/value heads evenly; the file is not a Qwen2.5 configuration"
            )
        return config


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight (C,)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        return ops.rms_norm(x, self.weight, self.eps)


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
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: tuple[SegmentGroup, ...]
    ) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        q, k, v = (
            project(x).view(x.shape[0], -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = ops.attention(ops.rotary(q, cos, sin), ops.rotary(k, cos, sin), v, groups)
        return self.o_proj(mixed.view(x.shape[0], -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: tuple[SegmentGroup, ...]
    ) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, groups)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Qwen2Model(nn.Module):
    """Embedding, layers and last norm: what a checkpoint calls `model`."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, groups: tuple[SegmentGroup, ...]
    ) -> torch.Tensor:
        """(T,) ids -> (T, C) hidden states after the last norm."""
        hidden = F.embedding(input_ids, self.embed_tokens.weight)
        cos, sin = ops.rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, hidden.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The layer runs again in backward with the same dropout masks: they are a function of a seed
                # that stays set until the next micro-batch (`lora.DropoutSeed`), so no generator is restored.
                hidden = checkpoint(layer, hidden, cos, sin, groups, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, cos, sin, groups)
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
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states of the rows that predict a supervised token: (S, C) compute dtype."""
        hidden = self.model(batch.input_ids, batch.position_ids, batch.groups)
        return hidden.index_select(0, batch.supervised_rows)
