"""Keys and values of rows that were run, for the rows behind them."""

import torch


class KVCache:
    """Keys and values of one layer for the rows that stand before those of a forward pass.

    A prompt's common prefix is run once and then stands before every batch of an evaluation; those of a conversation
    grow by a row with every token.

    Attributes:
        rows: how many rows are held.
        growing: whether a pass adds its own rows for the next one.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.growing = True
        self._held: torch.Tensor | None = None  # (2, rows or more, K, D) compute dtype, keys and values

    def before(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that this pass may look at: the earlier ones, then its own, (rows, K, D) each.

        Where a pass adds its rows, the room for them doubles whenever it is full: however many passes there are, a row
        is copied once more on average.
        """
        held, start, end = self._held, self.rows, self.rows + len(keys)
        if held is not None and not self.growing:
            return torch.cat((held[0, :start], keys)), torch.cat((held[1, :start], values))
        if held is None or held.shape[1] < end:
            larger = keys.new_empty(2, end if held is None else max(end, 2 * held.shape[1]), *keys.shape[1:])
            if held is not None:
                larger[:, :start] = held[:, :start]
            held = self._held = larger
        held[0, start:end], held[1, start:end] = keys, values
        self.rows = end
        return held[0, :end], held[1, :end]

    def keep(self, rows: int) -> None:
        """Forgets all but the first so many rows."""
        self.rows = min(self.rows, rows)
