"""The KV cache: keys and values of the tokens before those of a forward pass."""

import torch


class KVCache:
    """That of one layer: a prompt's common prefix, read by every batch of an evaluation, or a growing conversation."""

    def __init__(self) -> None:
        self.length = 0  # tokens that are held
        self.is_frozen = False  # a pass reads the cache and does not add its own tokens
        self._held: torch.Tensor | None = None  # (2, length or more, K, D) compute dtype, keys and values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that a pass may attend to: the cached ones, then its own, (length, K, D) each.

        The memory doubles whenever it is full: however many passes there are, a token is copied once more on average.
        """
        held, start, end = self._held, self.length, self.length + len(keys)
        if held is not None and self.is_frozen:
            return torch.cat((held[0, :start], keys)), torch.cat((held[1, :start], values))
        if held is None or held.shape[1] < end:
            larger = keys.new_empty(2, end if held is None else max(end, 2 * held.shape[1]), *keys.shape[1:])
            if held is not None:
                larger[:, :start] = held[:, :start]
            held = self._held = larger
        held[0, start:end], held[1, start:end] = keys, values
        self.length = end
        return held[0, :end], held[1, :end]

    def truncate(self, length: int) -> None:
        """Keeps only the first `length` tokens."""
        self.length = min(self.length, length)
