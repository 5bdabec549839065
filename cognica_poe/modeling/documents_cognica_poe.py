"""Documents that stand one behind the other in a row: where each begins, told by positions that restart.

``position_ids`` of transformers' flattening collator restart with every document::

    ids            a  b  c | d  e | f  g  h          places         0  1  2   0  1   0  1  2
    position_ids   0  1  2 | 0  1 | 0  1  2          is followed    1  1  0   1  0   1  1  0

As in transformers, a document begins wherever a position is not that of the token before plus one. Padding that an
``attention_mask`` names begins no document of the text; it is kept apart like one, so that nothing sees it.
"""

from __future__ import annotations

import torch
from transformers.utils import is_tracing

from .configuration_cognica_poe import CognicaPoEConfig, check

PARTING = ("eager", "sdpa", "flex_attention")
"""Attention implementations whose masks can part documents."""


def document_places(
    config: CognicaPoEConfig, ids: torch.Tensor, position_ids: torch.Tensor, attention_mask=None, cache=None
) -> torch.Tensor | None:
    """Place of every token in its document ``[B, T]``, from 0; None when every row is one document.

    Args:
        config: model configuration; says which attention is used.
        ids: token ids ``[B, T]``.
        position_ids: positions ``[B, T]`` or ``[1, T]``.
        attention_mask: 0 at padding, ``[B, past + T]``; a mask of four dimensions parts documents itself.
        cache: what was seen before. While a graph is traced, a row that has one is taken for one document.

    Raises:
        ValueError: positions of another shape, or documents under an attention that cannot part them.
    """
    (B, T), shape = ids.shape, list(position_ids.shape)
    check(shape in ([B, T], [1, T]), f"position_ids {shape} do not fit input_ids {[B, T]}")
    if T == 1 or (cache is not None and is_tracing(position_ids)):
        return None
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    padded = attention_mask is not None and attention_mask.ndim == 2
    if padded:
        real = attention_mask[:, -T:].bool()
        begins = begins & real[:, 1:] & real[:, :-1]
    if not is_tracing(begins) and not begins.any():
        return None
    how = config._attn_implementation
    check(how in PARTING, f"position_ids restart within a row: {how} cannot part documents; use {', '.join(PARTING)}")
    if padded:
        begins = begins | (real[:, 1:] != real[:, :-1])
    places = torch.arange(T, device=ids.device)
    starts = torch.where(begins, places[1:], 0).cummax(dim=1).values
    return torch.cat((places[:1].expand(B, 1), (places[1:] - starts).expand(B, -1)), dim=1)


def is_followed(places: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Bool ``[B, T]``: whether a token stands before another of its document; only real ones where ``real`` says."""
    followed = torch.cat((places[:, 1:] > 0, places[:, :1] < 0), dim=1)
    return followed if real is None else followed & real
