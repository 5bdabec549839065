"""Advance a block of pending tokens from one segment to another: the one primitive of all generation modes.

A segment is the layers up to the next head: a stage, or a part of one where it has exits. A row's tokens fill slots
0, 1, 2 ... of the buffers, its padding left out. Every segment has its own length per row, and none is ahead of the one
before it::

    slot             0    1    2    3    4    5    6  ...  spare
    ids              a    b    c    d    e    f    .          known      6
    segment 0        x    x    x    x    x    .    .          lengths[0] 5    f is pending
    segment 1         x    x    .    .    .    .    .          lengths[1] 2    c d e are owed, their states are kept

Running segment 1 takes the states c d e out of the buffer behind segment 0 and computes their keys and values in one
block: no token passes a layer twice, and none is ever missing one. Forgetting tokens is a matter of lengths. Rows of
unequal length need no padding: a query sees the slots up to its own, and lanes that a row does not use write to the
spare slot.

The first block of a segment, the prompt, runs at its own width. Every later one runs in pieces of exactly
``engine.width`` lanes over whole buffers, be it one new token, a block of drafts or tokens that were owed: a kernel of
fixed shape gives a token the same result wherever it stands, so that verifying rounds as decoding token by token does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .blocks_cognica_poe import attention_dtype
from .engine_cognica_poe import Engine, find_lanes


class StageCache:
    """Keys, values and boundary states of one batch, with a length per segment and row.

    ``states[k]`` holds the residual stream behind segment k. Buffers appear when a segment is first run.

    Args:
        engine: the arranged model; its ``width`` is that of every decode step.
        prompts: real ids of every row, ``[T_r]`` each.
        capacity: tokens per row to make room for.
    """

    def __init__(self, engine: Engine, prompts: list[torch.Tensor], capacity: int):
        self.engine, self.config = engine, engine.config
        self.known = [len(prompt) for prompt in prompts]
        self.lengths = [[0] * len(prompts) for _ in engine.segments]
        self.slots = slot_count(capacity + 1)  # the last one is the spare
        self.ids = prompts[0].new_zeros(len(prompts), self.slots)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = prompt
        self._lanes_of: tuple | None = None
        self.rows = torch.arange(len(prompts), device=self.ids.device)[:, None]
        self.states: list[torch.Tensor] = []
        self.keys: list[list[torch.Tensor]] = []
        self.values: list[list[torch.Tensor]] = []

    def append(self, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        """Make the first ``counts[r]`` of ``tokens`` ``[B, n]`` known in row r; they are then pending at segment 0."""
        if len(counts) == 1:  # a slice costs a tenth of an index
            start, count = self.known[0], int(counts[0])
            self.ids[0, start : start + count] = tokens[0, :count]
        else:
            _, write = find_lanes(self._place(self.known, counts), tokens.shape[1], self.slots - 1)
            self.ids[self.rows, write] = tokens
        self._lanes_of = None  # what was found at these places no longer holds
        self.known = [known + count for known, count in zip(self.known, counts, strict=True)]

    def truncate(self, known: list[int]) -> None:
        """Forget every row's tokens from ``known[r]`` on, in all segments."""
        self.known = [min(pair) for pair in zip(self.known, known, strict=True)]
        self.lengths = [[min(pair) for pair in zip(row, self.known, strict=True)] for row in self.lengths]

    def adopt(self, row: int, other: StageCache) -> None:
        """Let a row hold what the one row of another cache of the same engine and capacity holds.

        Segments that the other one has run come with it. A row that holds a text already forgets it.
        """
        for segment in range(len(self.states), len(other.states)):
            self._allocate(segment)
        known = other.known[0]
        self.ids[row, :known] = other.ids[0, :known]
        for segment, states in enumerate(other.states):
            mine = [self.states[segment], *self.keys[segment], *self.values[segment]]
            theirs = [states, *other.keys[segment], *other.values[segment]]
            for here, there in zip(mine, theirs, strict=True):
                here[row, :known] = there[0, :known]
        self.known[row], self._lanes_of = known, None
        for segment, lengths in enumerate(self.lengths):
            lengths[row] = other.lengths[segment][0]

    def last_known(self) -> list[int]:
        """Slot of the last known token of every row."""
        return [known - 1 for known in self.known]

    def advance(self, first: int, last: int, rows: list[bool]) -> None:
        """Run segments ``first`` to ``last`` on everything that is pending there, in the rows that take part.

        Whatever segment ``first`` computes is pending at the next one, together with what was owed there before.
        """
        for segment in range(first, last + 1):
            starts, ends = self.lengths[segment], self.lengths[segment - 1] if segment else self.known
            counts = [(end - start) * part for start, end, part in zip(starts, ends, rows, strict=True)]
            if not any(counts):
                continue
            wide = any(count and not start for count, start in zip(counts, starts, strict=True))
            width = max(counts) if wide else self.engine.width
            for done in range(0, max(counts), width):
                now = [min(max(count - done, 0), width) for count in counts]
                self._run(segment, [start + done for start in starts], now, width, wide)
            self.lengths[segment] = [start + count for start, count in zip(starts, counts, strict=True)]

    def _run(self, segment: int, starts: list[int], counts: list[int], width: int, wide: bool) -> None:
        if segment == len(self.states):  # the first run of a segment comes behind that of the one before
            self._allocate(segment)
        behind = self.states[segment - 1] if segment else None
        span = max(start + count for start, count in zip(starts, counts, strict=True)) if wide else self.slots
        buffers = (self.ids, behind, self.states[segment], self.keys[segment], self.values[segment])
        self.engine.run_segment(segment, width, span, self._place(starts, counts), *buffers)

    def _allocate(self, segment: int) -> None:
        config, space = self.config, (len(self.known), self.slots)
        states = torch.zeros(*space, config.hidden_size, dtype=self.engine.dtype, device=self.ids.device)
        shape, dtype = (*space, config.num_key_value_heads, config.head_dim), attention_dtype(config, states.dtype)
        for buffers in (self.keys, self.values):
            buffers.append([states.new_zeros(shape, dtype=dtype) for _ in config.segment_layers(segment)])
        self.states.append(states)

    def _place(self, starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Where the lanes of a block stand, ``[2, B]`` on the device; kept, for segments and heads of a step agree."""
        key = (tuple(starts), tuple(counts))
        if key != self._lanes_of:
            values = [starts, [int(count) for count in counts]]
            self._lanes_of, self._lanes = key, torch.tensor(values, device=self.ids.device)
        return self._lanes

    def logits(self, segment: int, starts: list[int], count: int = 1) -> torch.Tensor:
        """Capped logits ``[B, count, V]`` of the head behind a segment for the tokens from slot ``starts[r]`` on."""
        return self._heads((segment,), starts, count, None, 0.0)

    def pool(self, heads: Sequence[int], starts: list[int], count: int, weights, alpha: float) -> torch.Tensor:
        """Log-probabilities ``[B, count, V]`` of a pool for the tokens from slot ``starts[r]`` on.

        ``heads`` are those of its experts, by the segment that each stands behind.
        """
        weights = tuple(weights or [1.0 / len(heads)] * len(heads))
        return self._heads(tuple(heads), starts, count, weights, alpha)

    def _heads(self, heads: tuple[int, ...], starts: list[int], count: int, weights, alpha: float) -> torch.Tensor:
        states, width, pieces = [self.states[segment] for segment in heads], self.engine.width, []
        for done in range(0, count, width):
            lanes = self._place([start + done for start in starts], [min(count - done, width)] * len(starts))
            pieces.append(self.engine.run_heads(heads, weights, alpha, lanes, *states))
        return torch.cat(pieces, dim=1)[:, :count] if len(pieces) > 1 else pieces[0][:, :count]


def slot_count(needed: int) -> int:
    """Slots to allocate: few distinct sizes, since each is a shape that kernels are compiled for."""
    return max(64, 1 << (needed - 1).bit_length()) if needed <= 512 else -(-needed // 256) * 256
