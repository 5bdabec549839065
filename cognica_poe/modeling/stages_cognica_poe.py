"""Advance a block of pending tokens from one stage to another: the one primitive of all generation modes.

A row's tokens fill slots 0, 1, 2 ... of the buffers, its padding left out. Every stage has its own length per row, and
no stage is ahead of the one before it::

    slot             0    1    2    3    4    5    6
    ids              a    b    c    d    e    f    .      known      6
    stage 0          x    x    x    x    x    .    .      lengths[0] 5    f is pending
    stage 1          x    x    .    .    .    .    .      lengths[1] 2    c d e are owed, their states are kept

Running stage 1 takes the states c d e out of the buffer behind stage 0 and computes their keys and values in one block:
no token passes a layer twice, and none is ever missing one. Forgetting tokens is a matter of lengths. Rows of unequal
length need no padding: a query sees the slots up to its own, and lanes that a row does not use write to a spare slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Block:
    """Pending tokens of all rows at one stage: lanes ``[B, W]``, of which row r uses the first ``counts[r]``."""

    starts: list[int]
    """Slot of the first lane of every row."""
    counts: list[int]
    """Lanes that each row uses; 0 for a row that does not take part."""
    width: int
    """W."""
    uniform: bool
    """All rows use all lanes from the same slot on: plain slices serve, and one token needs no mask."""

    def slots(self, device: torch.device) -> torch.Tensor:
        """Slot of every lane, ``[B, W]``, or ``[1, W]`` when uniform."""
        starts = self.starts[:1] if self.uniform else self.starts
        return torch.tensor(starts, device=device)[:, None] + torch.arange(self.width, device=device)


class StageCache:
    """Keys, values and boundary states of one batch, with a length per stage and row.

    ``states[k]`` holds the input of stage k: the embeddings for stage 0 (all layers read those), the residual stream
    behind stage k-1 otherwise; ``states[K]`` is the end of the trunk. Buffers appear when a stage is first run.

    Args:
        model: the causal language model.
        prompts: real ids of every row, ``[T_r]`` each.
        capacity: tokens per row to make room for.
        fixed_width: when given, blocks of at most that many tokens run at exactly that width over whole buffers. A
            kernel of a fixed shape gives a token the same result wherever it stands in its block, so that verifying a
            block rounds as decoding token by token does.
    """

    def __init__(self, model, prompts: list[torch.Tensor], capacity: int, fixed_width: int | None = None):
        self.model, self.config = model, model.config
        self.capacity, self.fixed_width = capacity, fixed_width
        self.known = [len(prompt) for prompt in prompts]
        self.lengths = [[0] * len(prompts) for _ in range(self.config.num_stages)]
        # One slot more than the capacity: unused lanes write there and nobody reads it.
        self.ids = prompts[0].new_zeros(len(prompts), capacity + 1)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = prompt
        self.states: list[torch.Tensor | None] = [None] * (self.config.num_stages + 1)
        self.keys: list[torch.Tensor | None] = [None] * self.config.num_hidden_layers
        self.values: list[torch.Tensor | None] = [None] * self.config.num_hidden_layers

    def append(self, tokens: torch.Tensor, rows: list[bool]) -> None:
        """Make ``tokens`` ``[B]`` known in the rows that take part; they are then pending at stage 0."""
        slots = [known if part else self.capacity for known, part in zip(self.known, rows, strict=True)]
        self.ids[torch.arange(len(slots), device=self.ids.device), self._indices(slots)] = tokens
        self.known = [known + part for known, part in zip(self.known, rows, strict=True)]

    def truncate(self, known: list[int]) -> None:
        """Forget every row's tokens from ``known[r]`` on, in all stages."""
        self.known = [min(pair) for pair in zip(self.known, known, strict=True)]
        self.lengths = [[min(pair) for pair in zip(row, self.known, strict=True)] for row in self.lengths]

    def read(self, boundary: int, starts: list[int], width: int = 1) -> torch.Tensor:
        """States ``[B, width, D]`` behind stage ``boundary - 1`` of the tokens from slot ``starts[r]`` on."""
        if len(set(starts)) == 1:
            return self.states[boundary][:, starts[0] : starts[0] + width]
        return self._gather(self.states[boundary], Block(starts, [width] * len(starts), width, False))

    def advance(self, first: int, last: int, rows: list[bool]) -> None:
        """Run stages ``first`` to ``last`` on everything that is pending there, in the rows that take part.

        Whatever stage ``first`` computes is pending at the next one, together with what was owed there before.
        """
        for stage in range(first, last + 1):
            ends = self.lengths[stage - 1] if stage else self.known
            ends = [end if part else length for end, length, part in zip(ends, self.lengths[stage], rows, strict=True)]
            block = self._block(self.lengths[stage], ends)
            if block is not None:
                self._run(stage, block)
                self.lengths[stage] = ends

    # ---- one stage ------------------------------------------------------------------------------------------------

    def _block(self, starts: list[int], ends: list[int]) -> Block | None:
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        width = max(counts)
        if width == 0:
            return None
        if self.fixed_width is not None and width <= self.fixed_width:
            width = self.fixed_width
        uniform = len(set(starts)) == 1 and set(counts) == {width}
        return Block(list(starts), counts, width, uniform)

    def _run(self, stage: int, block: Block) -> None:
        model, ids = self.model, self._gather(self.ids, block)
        if stage == 0:
            self._put(self.states, 0, model.embed(ids, previous=self._previous(block)), block)
        x0 = self._gather(self.states[0], block)
        x = self._gather(self.states[stage], block) if stage else x0
        slots = block.slots(ids.device)
        view = BlockView(self, block)
        x = model.run_layers(self.config.stage_layers(stage), x, x0, ids, model.rotary(slots), view.masks(slots), view)
        self._put(self.states, stage + 1, x, block)

    def _previous(self, block: Block) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Id and realness, each ``[B, 1]``, of the token before every row's block."""
        if not any(block.starts):
            return None
        before = self._indices([max(start - 1, 0) for start in block.starts])[:, None]
        return self.ids.gather(1, before), self._indices(block.starts)[:, None] > 0

    def _indices(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.ids.device)

    def _gather(self, buffer: torch.Tensor, block: Block) -> torch.Tensor:
        """Lanes ``[B, W, ...]`` of a buffer ``[B, slots, ...]``."""
        if block.uniform:
            return buffer[:, block.starts[0] : block.starts[0] + block.width]
        rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
        return buffer[rows, block.slots(buffer.device).clamp(max=self.capacity)]

    def _put(self, buffers: list[torch.Tensor | None], index: int, lanes: torch.Tensor, block: Block) -> None:
        """Write lanes ``[B, W, ...]`` into ``buffers[index]`` ``[B, slots, ...]``, made when it does not exist yet."""
        if buffers[index] is None:
            buffers[index] = lanes.new_zeros(lanes.shape[0], self.capacity + 1, *lanes.shape[2:])
        if block.uniform:
            buffers[index][:, block.starts[0] : block.starts[0] + block.width] = lanes
            return
        slots = block.slots(lanes.device)
        used = torch.arange(block.width, device=lanes.device) < self._indices(block.counts)[:, None]
        rows = torch.arange(lanes.shape[0], device=lanes.device)[:, None]
        buffers[index][rows, torch.where(used, slots, self.capacity)] = lanes


class BlockView:
    """The cache as the layers of one block see it: where to write, which slots to read, how to attend."""

    def __init__(self, cache: StageCache, block: Block):
        self.cache, self.block = cache, block
        self.config = cache.config
        whole = cache.fixed_width is not None and block.width == cache.fixed_width
        self.end = cache.capacity if whole else min(cache.capacity, max(block.starts) + block.width)
        first = 0 if whole else min(start for start, count in zip(block.starts, block.counts, strict=True) if count)
        self.begin = {"full_attention": 0, "sliding_attention": max(0, first + 1 - self.config.sliding_window)}

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[B, G, W, h]`` keys and values; return the readable slots, ``[B, G, slots, h]``."""
        cache, begin = self.cache, self.begin[self.config.layer_types[layer]]
        cache._put(cache.keys, layer, k.transpose(1, 2), self.block)
        cache._put(cache.values, layer, v.transpose(1, 2), self.block)
        return tuple(buffer[layer][:, begin : self.end].transpose(1, 2) for buffer in (cache.keys, cache.values))

    def masks(self, slots: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Boolean mask ``[B or 1, 1, W, slots]`` per layer type; None where causality alone decides."""
        return {kind: self._mask(slots, kind) for kind in set(self.config.layer_types)}

    def _mask(self, slots: torch.Tensor, kind: str) -> torch.Tensor | None:
        begin, window = self.begin[kind], self.config.sliding_window
        sliding = kind == "sliding_attention"
        if self.block.uniform and self.end == self.block.starts[0] + self.block.width:
            whole_text = begin == self.block.starts[0] == 0 and (not sliding or self.end <= window)
            if self.block.width == 1 or whole_text:
                return None
        key = torch.arange(begin, self.end, device=slots.device)
        # Lanes that no row uses may lie outside; they must see some slot, or the softmax would give nan.
        query = slots.clamp(begin, self.end - 1)[:, None, :, None]
        visible = key <= query
        return visible & (key > query - window) if sliding else visible

    def attend(self, attention, q, k, v, mask) -> torch.Tensor:
        """Attention of ``[B, N, W, h]`` queries over ``[B, G, slots, h]``; returns ``[B, W, N, h]``."""
        dtype, scaling = q.dtype, attention.head_dim**-0.5
        if self.config.attention_in_fp32 and dtype != torch.float64:
            q, k, v = q.float(), k.float(), v.float()
        B, N, W, h = q.shape
        if mask is None and W > 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            # Heads that share keys become further queries: nothing is repeated in memory.
            groups = attention.num_key_value_groups
            mask = mask.repeat(1, 1, groups, 1) if mask is not None else None
            q = q.reshape(B, N // groups, groups * W, h)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).reshape(B, N, W, h)
        return out.transpose(1, 2).to(dtype)
