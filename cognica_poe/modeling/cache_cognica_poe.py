"""Key/value cache of ``generate()`` and ``forward()`` (model card, "KV cache"); it grows by doubling.

::

    position        0     1     2   ...  length-1 | length ...  allocated ... max_length
    layer 0..L-1   [ keys and values, [B, G, S, h] | free               ]
    ids, real      [ token ids [B, S], padding?    | free                              ]

The token ids are kept beside the keys because smear needs the embedding of the token before a block and the value
embeddings are looked up by id; rolling back is then a matter of lengths alone.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_cognica_poe import check


class CognicaCacheLayer(DynamicLayer):
    """Keys and values of one layer, ``[B, G, S, h]`` in the dtype of the first states written, S up to max_length.

    Only the first ``length`` of the S slots count.
    """

    keys: torch.Tensor  # from the first update on
    values: torch.Tensor

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, G, T, h]`` states and return views of everything so far, ``[B, G, length, h]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (self._grown(old, start) for old in (self.keys, self.values))
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _grown(self, old: torch.Tensor, used: int) -> torch.Tensor:
        # Doubling copies every token at most twice; a whole context up front would be wasted on a single forward.
        size = min(self.max_length, max(2 * old.shape[2], -(-self.length // 64) * 64))
        new = old.new_empty(*old.shape[:2], size, old.shape[3])
        new[:, :, :used] = old[:, :, :used]
        return new

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        check(tokens_to_remove <= 0, f"crop takes minus the number of tokens to forget, not {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        self.length = 0


class CognicaKVCache(Cache):
    """Cache of all layers of one batch. ``generate()`` keeps it from step to step.

    Args:
        config: model configuration; one layer per ``num_hidden_layers``.
        max_length: tokens to make room for; ``config.max_position_embeddings`` when omitted.
    """

    def __init__(self, config, max_length: int | None = None):
        self.max_length = max_length or config.max_position_embeddings
        super().__init__(layers=[CognicaCacheLayer(self.max_length) for _ in range(config.num_hidden_layers)])
        self.ids = self.real = torch.empty(0)  # allocated with the first ids

    def record(self, ids: torch.Tensor, real: torch.Tensor | None) -> None:
        """Remember the ids ``[B, T]`` of the block about to run, and which of them are real (``None``: all)."""
        start, end = self.get_seq_length(), self.get_seq_length() + ids.shape[1]
        check(end <= self.max_length, f"the context is full: {end} tokens do not fit a cache of {self.max_length}")
        if not self.ids.numel():
            self.ids = ids.new_zeros(ids.shape[0], self.max_length)
            self.real = torch.zeros_like(self.ids, dtype=torch.bool)
        self.ids[:, start:end] = ids
        self.real[:, start:end] = True if real is None else real

    def previous(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Id and realness, each ``[B, 1]``, of the token before the next block; None at the start of the text."""
        length = self.get_seq_length()
        if length == 0:
            return None
        return self.ids[:, length - 1 : length], self.real[:, length - 1 : length]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.ids.numel():
            self.ids, self.real = self.ids[indices], self.real[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.ids.numel():
            self.ids, self.real = (t.repeat_interleave(repeats, dim=0) for t in (self.ids, self.real))
