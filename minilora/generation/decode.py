"""A model and token ids in, the ids that follow out, one by one: greedy or sampled, with a KV cache.

    prefill     a prompt's ids in pieces  -> keys and values of each layer (`kv_cache.py`), the last hidden state
    decode      the token before          -> one more key and value per layer, the last hidden state
    logits      head @ hidden state, (V,) -> next token: argmax, or a sample from softmax(logits)

The logits are processed as in transformers' `generate`, in its order:

    repetition penalty r    of every token among the ids: z / r if z > 0, else z * r; in greedy decoding too
    temperature t           z / t
    top-k                   the k largest are kept, and those equal to the smallest of them
    top-p                   the fewest most probable ones that together reach p are kept

A sample is argmax of p_i / e_i with exponentially distributed e_i, which is i with probability p_i: no cumulative sum,
and one synchronisation with a GPU per token.

A conversation is one `DecodeState`: its cache stays, so a turn costs its own tokens only.

Left out: several answers at once, beam search, speculative decoding.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.attention import sdpa_kernel

from minilora.adapters.attach import iter_lora_layers
from minilora.generation.gemv import make_product
from minilora.qlora.attention import KERNELS
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.loss import head_logits
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.system.schema import limits

MOST_TIES = 64  # with the last of the top k
PREFILL_TOKENS = 2048  # of a forward pass: a longer prompt is prefilled in pieces, which bounds its activations


@dataclass(frozen=True)
class GenerationConfig:
    """The fields of generation_config.json that are read, under their own names."""

    do_sample: bool = True  # False takes the most probable token, as temperature 0 does
    temperature: float = field(default=0.7, metadata=limits(minimum=0, maximum=100))
    top_p: float = field(default=0.8, metadata=limits(above=0, maximum=1))  # 1 keeps all
    top_k: int = field(default=20, metadata=limits(minimum=0))  # 0 keeps all
    repetition_penalty: float = field(default=1.05, metadata=limits(above=0, maximum=100))  # 1 is none
    max_new_tokens: int = field(default=1024, metadata=limits(minimum=1))
    eos_token_id: list[int] | int | None = None  # read by `chat.py`


class DecodeState:
    """Token ids and the KV cache of those that the model has processed."""

    def __init__(self, model: Qwen2ForCausalLM, ids: Sequence[int] = ()):
        self.ids = list(ids)  # prompts and answers; may be appended to, `truncate` removes
        self._model = model
        self._caches = [KVCache() for _ in model.model.layers]
        self._num_cached = 0  # tokens in every layer's cache; after an interruption some layers have more

    def truncate(self, length: int) -> None:
        """Keeps the first `length` ids."""
        del self.ids[length:]
        self._num_cached = min(self._num_cached, length)

    def recompute(self) -> None:
        """Drops the KV cache, because the model has changed: its adapter was switched off or on."""
        self._num_cached = 0

    @torch.inference_mode()
    def next_logits(self) -> torch.Tensor:
        """(V,) float32 logits of the next token; prefills the ids that are not in the cache."""
        self._num_cached = min(self._num_cached, len(self.ids) - 1)  # the last hidden state is not cached
        for layer in self._caches:
            layer.truncate(self._num_cached)
        head = self._model.head_weight
        with sdpa_kernel(KERNELS):  # once a token, not in each layer
            for start in range(self._num_cached, len(self.ids), PREFILL_TOKENS):
                piece = torch.tensor(self.ids[start : start + PREFILL_TOKENS], device=head.device)
                hidden = self._model.prefill(piece, self._caches)
        self._num_cached = len(self.ids)
        return head_logits(hidden, head)[0]


@torch.inference_mode()
def generate(
    state: DecodeState,
    config: GenerationConfig,
    *,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens after `state.ids`, one at least, each appended to them before it is yielded.

    Ends before the first of `stop_ids`, which is neither yielded nor appended. `generator` is on the model's device:
    the same seed gives the same tokens. FloatingPointError for a logit that is NaN.
    """
    seen = None
    for _ in range(config.max_new_tokens):
        logits = state.next_logits()
        if config.repetition_penalty != 1:
            if seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[torch.tensor(state.ids, device=seen.device)] = True
            logits = penalize(logits, seen, config.repetition_penalty)
        chosen = int(choose(logits, config, generator))  # the only synchronisation with a GPU
        if chosen < 0:
            raise FloatingPointError("a logit is NaN")
        if chosen in stop_ids:
            return
        state.ids.append(chosen)
        if seen is not None:
            seen[chosen] = True
        yield chosen


def choose(logits: torch.Tensor, config: GenerationConfig, generator: torch.Generator | None) -> torch.Tensor:
    """The token after logits (V,), or -1 where one of them is NaN: () int64 on their device."""
    temperature = config.temperature if config.do_sample else 0.0
    if temperature == 0:
        best, token = logits.max(dim=-1)
    else:
        tokens, kept = candidates(logits, temperature, config.top_k, config.top_p)
        noise = torch.empty_like(kept).exponential_(generator=generator)
        best, index = (kept.softmax(dim=-1) / noise).max(dim=-1)
        token = tokens.take(index)  # `tokens[index]` would ask the device for the index
    return torch.where(best.isnan(), -1, token)


def penalize(logits: torch.Tensor, seen: torch.Tensor, repetition_penalty: float) -> torch.Tensor:
    """Logits (V,) with those of the tokens in the mask `seen` (V,) lowered."""
    lower = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return torch.where(seen, lower, logits)


def candidates(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to sample from and their logits, (n,) each, -inf where top-p excludes; `logits` (V,) float32."""
    logits = logits / temperature
    if 0 < top_k < len(logits):
        # With the last one's ties, a fixed number of them: to count them a GPU would be waited for.
        logits, tokens = logits.topk(min(top_k + MOST_TIES, len(logits)))
        logits = logits.masked_fill(logits < logits[top_k - 1], -torch.inf)  # NaN is kept: `generate` refuses it
    else:
        tokens = torch.arange(len(logits), device=logits.device)
    if top_p < 1:  # after top-k a few are sorted, instead of the vocabulary's 152k, which takes 16 ms
        logits, order = logits.sort()
        tokens = tokens[order]
        outside = logits.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        outside[-1] = False  # one is always kept
        logits = logits.masked_fill(outside, -torch.inf)
    return tokens, logits


def use_gemv(model: Qwen2ForCausalLM) -> None:
    """Multiplies projections in 4 bits by GEMV on 4-bit weights where `gemv.py` can; those cache no dense weight then.

    Layers with DoRA do not change: they need the dense weight anyway, for the norms of its rows.
    """
    with_dora = {
        id(layer.base)
        for _, layer in iter_lora_layers(model)
        if layer.weights and layer.weights.lora_magnitude_vector is not None
    }
    for module in model.modules():
        if isinstance(module, Linear4bit) and id(module) not in with_dora:
            module.gemv = make_product(module.weight, model.head_weight.dtype)
            module.cache_dequantized &= module.gemv is None
