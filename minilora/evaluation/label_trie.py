"""Label words in, their log-probabilities behind each question out, whatever their length, in one forward pass.

    question ... assistant ─┬─ 酒店        the question's last position predicts every first token
                            ├─ 手 ── 机    an inner node is a token that another one follows: it is computed behind the
                            └─ 洗 ┬─ 发    question, once for all words that begin with it, and predicts what follows
                                  └─ 衣

    log p(word) = sum over its tokens of  z[token] - logsumexp(z),     z = W h, h of the node before the token

With N inner nodes a question costs N tokens more, not a pass for each word; where every word is one token there are
none. A node attends to the question and to its ancestors. The first tokens' normaliser is common to all words and
cancels, so only inner nodes need one, over the whole vocabulary.

The nodes are in depth-first order, so that the descendants of a node follow it: `SegmentGroup.last_query` then says
with two numbers a token which nodes attend to which.

Source: tree attention, as in speculative decoding (SpecInfer, arXiv 2305.09781). Left out: to drop words that can no
longer win, because log loss and calibration need their small probabilities.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from minilora.qlora.batch import MicroBatch, SegmentGroup, move_together, pack, pad_segments, round_up_tokens
from minilora.qlora.kv_cache import KVCache
from minilora.qlora.loss import chunk_positions, head_logits
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import Example

EXACT_LOGITS = 8  # largest logits of a position that are computed in float32 for its normaliser


class LabelTrie:
    """Words of one token or more as a trie; none begins another.

    Attributes:
        words: their ids.
        inner_tokens: N, the token of each inner node in depth-first order.
        depths: (N,) int64, tokens above an inner node.
        last_descendants: (N,) int64, index of the last inner node below a node, or its own.
    """

    def __init__(self, words: Sequence[Sequence[int]]):
        self.words = [tuple(word) for word in words]
        nodes = sorted({word[:depth] for word in self.words for depth in range(1, len(word) + 1)})
        inner = sorted({node[:-1] for node in nodes} - {()})
        self.inner_tokens = [node[-1] for node in inner]
        self.depths = torch.tensor([len(node) - 1 for node in inner], dtype=torch.int64)
        last = {node[:depth]: index for index, node in enumerate(inner) for depth in range(1, len(node) + 1)}
        self.last_descendants = torch.tensor([last[node] for node in inner], dtype=torch.int64)
        # All nodes, E of them: a token, and what predicts it, the question (0) or an inner node (counted from 1).
        states = {(): 0, **{node: 1 + index for index, node in enumerate(inner)}}
        self._tokens = torch.tensor([node[-1] for node in nodes])
        self._parents = torch.tensor([states[node[:-1]] for node in nodes])
        self._paths = torch.zeros(len(nodes), len(words), dtype=torch.float64)  # 1 where a node is of a word
        index = {node: number for number, node in enumerate(nodes)}
        for column, word in enumerate(self.words):
            self._paths[[index[word[:depth]] for depth in range(1, len(word) + 1)], column] = 1

    def parts(self, max_nodes: int) -> Iterator[tuple[list[int], "LabelTrie"]]:
        """Indices of words and a trie of them, each with at most `max_nodes` inner nodes, or of one word."""
        if len(self.inner_tokens) <= max_nodes:
            yield list(range(len(self.words))), self
            return
        chosen: list[int] = []
        nodes: set[tuple[int, ...]] = set()
        for index in sorted(range(len(self.words)), key=self.words.__getitem__):
            own = {self.words[index][:depth] for depth in range(1, len(self.words[index]))}
            if chosen and len(nodes | own) > max_nodes:
                yield chosen, LabelTrie([self.words[i] for i in chosen])
                chosen, nodes = [], set()
            chosen.append(index)
            nodes |= own
        yield chosen, LabelTrie([self.words[i] for i in chosen])

    def run(
        self, model: Qwen2ForCausalLM, kv_cache: Sequence[KVCache] | None, examples: Sequence[Example]
    ) -> tuple[MicroBatch, torch.Tensor, torch.Tensor]:
        """Examples as a micro-batch, its hidden states (S, C), and (n, 1 + N, C) of each question and its nodes.

        The model is in evaluation mode; the KV cache holds a prefix of all examples, if there is one.
        """
        batch = pack(examples, cached_prefix=0 if kv_cache is None else kv_cache[0].length)
        n, count, device = len(examples), len(self.inner_tokens), model.head_weight.device
        first = torch.searchsorted(batch.example_indices, torch.arange(n)).to(device)
        if not count:
            hidden = model(batch.to(device), kv_cache)
            return batch, hidden, hidden[first, None]
        nodes = torch.arange(n * count).view(n, count)
        queries = int(batch.supervised_positions[-1]) + 1 + nodes  # behind the last example
        group = self._group(batch, examples, queries)
        starts = torch.tensor([[example.answer_start] for example in examples])
        inputs = (
            _append(batch.input_ids, queries, torch.tensor(self.inner_tokens).expand(n, count)),
            _append(batch.position_ids, queries, starts + self.depths),
            torch.cat((batch.supervised_positions, queries.flatten())),
        )
        input_ids, position_ids, positions = move_together(inputs, device)
        hidden = model.model(
            input_ids,
            position_ids,
            (*batch.groups, group),
            last_groups=(*batch.last_groups, replace(group, queries=batch.num_supervised + nodes)),
            positions=positions,
            kv_cache=kv_cache,
        )
        of_nodes = hidden[batch.num_supervised :].view(n, count, -1)
        return batch, hidden[: batch.num_supervised], torch.cat((hidden[first, None], of_nodes), dim=1)

    def _group(self, batch: MicroBatch, examples: Sequence[Example], queries: torch.Tensor) -> SegmentGroup:
        """Attention of the nodes, (n, N) tokens of a pass, to the questions before them and to their ancestors."""
        prefix, count = batch.groups[-1].prefix, queries.shape[1]
        lengths = [len(example.input_ids) - 1 - prefix for example in examples]
        starts = list(accumulate(lengths, initial=prefix))
        spans = [range(start, start + e.answer_start - prefix) for start, e in zip(starts, examples, strict=False)]
        questions, padding = pad_segments(spans)
        seen = prefix + questions.shape[1]
        end = seen + count
        last_query = (
            torch.full((len(examples), prefix), end),
            torch.full(questions.shape, end).masked_fill_(padding, 0),
            (seen + self.last_descendants).expand_as(queries),
        )
        return SegmentGroup(
            prefix,
            keys=torch.cat((questions, starts[-1] + torch.arange(queries.numel()).view_as(queries)), dim=1),
            queries=queries,
            padding=torch.zeros_like(queries, dtype=torch.bool),
            last_key=(seen + torch.arange(count)).expand_as(queries),
            last_query=torch.cat(last_query, dim=1),
        )

    def log_probabilities(self, states: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
        """(n, words) float64 on the CPU: log p(word), up to a constant for each question; `states` are from `run`."""
        n, num_states, _ = states.shape
        wide = states.flatten(0, 1).to(torch.promote_types(states.dtype, torch.float32))
        logits = head_logits(wide, head_weight[self._tokens.to(states.device)].to(wide.dtype))
        of_nodes = logits.view(n, num_states, -1)[:, self._parents, torch.arange(len(self._tokens))].double()
        normalizers = torch.zeros(n, num_states, dtype=torch.float64, device=states.device)
        if num_states > 1:
            normalizers[:, 1:] = log_normalizers(states[:, 1:].flatten(0, 1), head_weight).view(n, -1)
        of_nodes -= normalizers[:, self._parents]
        return of_nodes.cpu() @ self._paths


def log_normalizers(hidden: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """logsumexp of the logits at each position: (S, C) -> (S,) float32 or wider; no gradient is kept.

    A piece of the vocabulary at a time, so that its logits never exist as a whole, nor a float32 copy of the head. In
    bfloat16 a logit of 30 is rounded by up to 0.06. Over the vocabulary that averages out, unless few tokens have most
    of the probability: so the largest logits are computed again in float32, `EXACT_LOGITS` of the pieces' maxima.
    """
    normalizers, maxima, tokens = [], [], []
    size = chunk_positions(sum(hidden.shape), hidden.device.type)
    for start in range(0, len(head_weight), size):
        logits = head_logits(hidden, head_weight[start : start + size])
        maximum, token = logits.max(dim=1)
        maxima.append(maximum)
        tokens.append(start + token)
        normalizers.append(logits[:, 0] - logits.log_softmax(1)[:, 0])  # on a CPU 5 times as fast as `logsumexp`
    total = torch.stack(normalizers).logsumexp(0)
    if hidden.dtype == total.dtype:
        return total
    rounded, pieces = torch.stack(maxima).topk(min(EXACT_LOGITS, len(maxima)), dim=0)
    error = torch.zeros_like(total)  # of the sum, as a share of it
    for approximate, token in zip(rounded, torch.stack(tokens).gather(0, pieces), strict=True):
        exact = (hidden.to(total.dtype) * head_weight[token]).sum(1)
        error += (approximate - total).exp() - (exact - total).exp()
    return total + torch.log1p(-error)


def _append(packed: torch.Tensor, queries: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Ids or positions of a pass with those of the nodes behind them, in place of padding, and padding again."""
    end = int(queries[-1, -1]) + 1
    padding = packed.new_zeros(round_up_tokens(end) - end)
    return torch.cat((packed[: int(queries[0, 0])], values.flatten(), padding))
