"""Keys and values of the rows that a transformer has computed, so that it can go on row by row."""

from typing import NamedTuple

from torch import Tensor


class KVCache(NamedTuple):
    """Keys and values of every layer for `length` rows; its size never changes, so a step can be captured.

    Row 0 is the whole condition (see `Attention`), which takes one row of the cache however long it is.
    """

    keys: Tensor  # [n_layer, B, n_kv_head, length, head_dim]
    values: Tensor  # [n_layer, B, n_kv_head, length, head_dim]
    first_weight: Tensor  # [B] fp32, the number of tokens that row 0 counts as; 1 for a class

    def upto(self, rows: int) -> "KVCache":
        """The first rows, in the same memory."""
        return self._replace(keys=self.keys[:, :, :, :rows], values=self.values[:, :, :, :rows])

    def sequences(self, part: slice) -> "KVCache":
        """Those of the B sequences, in the same memory."""
        return KVCache(self.keys[:, part], self.values[:, part], self.first_weight[part])

    def begin_with(self, prefixes: "KVCache", index: Tensor) -> None:
        """Begin sequence i as sequence index[i] (of B on the device) of another cache, with all the rows it has."""
        begun = self.upto(prefixes.keys.shape[3])
        for own, prefix, dimension in zip(begun, prefixes, (1, 1, 0), strict=True):
            own.copy_(prefix.index_select(dimension, index))


class LayerCache(NamedTuple):
    """What one attention layer needs to compute one row; `keys` and `values` are updated in place."""

    keys: Tensor  # [B, n_kv_head, length, head_dim]
    values: Tensor  # [B, n_kv_head, length, head_dim]
    row: Tensor  # [1] int64, the row being computed
    mask: Tensor  # [1, 1, 1, length] bool, true up to that row; after a text [B, ...] fp32, what is added to scores
