"""A model and ids in, the ids that go on out, one after another: greedy or drawn, with a key/value cache.

    ids run so far   keys and values are held by layer     (`kv_cache.py`)
    ids not yet run  a prompt, or the token before         -> hidden state of the last one -> logits, (V,)
    next token       argmax, or a draw from softmax(logits as `candidates` leaves them)

The logits pass what transformers' `generate` lets them pass, in its order:

    repetition penalty r    of every token that stands in the ids: z / r if z > 0, else z * r; greedy decoding too
    temperature t           z / t
    top-k                   the k largest stay, and what equals the last of them
    top-p                   of the most probable ones as few as together reach p

The draw is argmax of p_i / e_i with e_i exponentially distributed, whose winner is i with probability p_i: no sum, and
nothing that waits for a GPU.

A conversation is one `Context`: whatever was run stays in its cache, so that a turn costs its own rows alone.

Left out: several answers at once, beam search, speculative decoding.
"""

from collections.abc import Collection, Iterator, Sequence

import torch

from minilora.adapters.attach import iter_lora_layers
from minilora.generation.gemv import make_product
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.loss import head_logits
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit

# Ids of a forward pass: a longer prompt goes in pieces, which bounds its activations.
MAX_ROWS = 2048


class Context:
    """Ids that a model goes on with, and what it has computed of them.

    Attributes:
        ids: all of them, prompts and answers. To append is free; what was changed before is told by `cut`.
    """

    def __init__(self, model: Qwen2ForCausalLM, ids: Sequence[int] = ()):
        """Ids behind which nothing has been computed yet."""
        self.ids = list(ids)
        self._model = model
        self._past = [KVCache() for _ in model.model.layers]
        self._rows = 0  # that all layers hold; one that was interrupted may hold more

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._model.head_weight.device

    def cut(self, length: int) -> None:
        """Forgets all but the first so many ids."""
        del self.ids[length:]
        self._rows = min(self._rows, length)

    def recompute(self) -> None:
        """Has all ids run again with the next token: the model has changed, as with its adapter off."""
        self._rows = 0

    @torch.inference_mode()
    def next_logits(self) -> torch.Tensor:
        """(V,) float32 logits of what comes next; runs the ids that were not run yet."""
        self._rows = min(self._rows, len(self.ids) - 1)  # the last one's hidden state is not kept
        for layer in self._past:
            layer.truncate(self._rows)
        for start in range(self._rows, len(self.ids), MAX_ROWS):
            piece = torch.tensor(self.ids[start : start + MAX_ROWS], device=self.device)
            hidden = self._model.prefill(piece, self._past)
        self._rows = len(self.ids)
        return head_logits(hidden, self._model.head_weight)[0]


@torch.inference_mode()
def generate(
    context: Context,
    max_new_tokens: int,
    *,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Goes on with `context`, token by token; each is in `context.ids` before it is yielded.

    Args:
        context: one id at least.
        max_new_tokens: how many at most.
        stop_ids: ends before the first of these, which is neither yielded nor kept.
        temperature: 0 takes the most probable token.
        top_k: 0 for all.
        top_p: 1 for all.
        repetition_penalty: 1 for none.
        generator: on the context's device; the same state gives the same tokens.

    Raises:
        FloatingPointError: a logit is NaN.
    """
    seen = None
    for _ in range(max_new_tokens):
        logits = context.next_logits()
        if repetition_penalty != 1:
            if seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[torch.tensor(context.ids, device=seen.device)] = True
            logits = penalize(logits, seen, repetition_penalty)
        if temperature == 0:
            best, token = logits.max(dim=-1)
        else:
            tokens, left = candidates(logits, temperature, top_k, top_p)
            noise = torch.empty_like(left).exponential_(generator=generator)
            best, place = (left.softmax(dim=-1) / noise).max(dim=-1)
            token = tokens[place]
        chosen = int(torch.where(best.isnan(), -1, token))  # the one time that a GPU is waited for
        if chosen < 0:
            raise FloatingPointError("a logit is NaN")
        if chosen in stop_ids:
            return
        context.ids.append(chosen)
        if seen is not None:
            seen[chosen] = True
        yield chosen


def penalize(logits: torch.Tensor, seen: torch.Tensor, repetition_penalty: float) -> torch.Tensor:
    """Logits (V,) with those of the tokens that were `seen` (V,) made less probable."""
    lower = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return torch.where(seen, lower, logits)


def candidates(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn and their logits, (n,) each; one whose logit is -inf may not.

    Args:
        logits: (V,) float32.
        temperature: above 0.
        top_k: 0 for all.
        top_p: 1 for all.
    """
    logits = logits / temperature
    if 0 < top_k < len(logits):
        tokens = (logits >= logits.topk(top_k).values[-1]).nonzero().squeeze(1)
        logits = logits[tokens]
    else:
        tokens = torch.arange(len(logits), device=logits.device)
    if top_p < 1:  # behind top-k a few are sorted, and not the 152k of the vocabulary, which takes 16 ms
        logits, order = logits.sort()
        tokens = tokens[order]
        outside = logits.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        outside[-1] = False  # one always stays
        logits = logits.masked_fill(outside, -torch.inf)
    return tokens, logits


def speed_up(model: Qwen2ForCausalLM) -> None:
    """Has projections in 4 bits multiplied straight from them where `gemv.py` can; those keep no dense weight then.

    DoRA's layers stay as they are: the lengths of their rows are computed from the dense weight.
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
