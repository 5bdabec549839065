"""Packing: rows(shard, epoch) = f(shard, tokenizer, seed, epoch, row_len), all of it, nothing else.

Every row starts with BOS, every document start has a BOS in front, there is no padding. A document longer than a row is
cut into full rows and one remainder; remainders and short documents are put together by best fit. Where nothing fits
a gap, the longest waiting document is cut to fill it and goes on at the start of another row. Only the last, unfilled
row of a shard is dropped. (The usual best-fit loader crops instead, and loses about a third of the tokens.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.data.documents import Document
from cognica_poe.data.manifest import DataManifest, load_manifest, read_documents
from cognica_poe.data.rows.layout import lay_out_rows
from cognica_poe.data.rows.store import (
    PackedRows,
    RowIndex,
    are_complete,
    load_facts,
    verify_rows,
    write_facts,
    write_rows,
)
from cognica_poe.data.tokenizer import Tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import disk_errors, folder_for, require_space
from cognica_poe.leftovers import partial_file, sweep

_VERSION = 2  # of the algorithm; part of the fingerprint
_BATCH = 256  # documents encoded at a time
CASES = ("as is", "lower", "upper")
"""Letter case of a document in the rows of an epoch."""
_LOWER_SHARE = 0.8


def random_bits(count: int, *key: object) -> np.ndarray:
    """uint64 [count] that depend on ``key`` alone (Philox; its raw stream is the same in every version)."""
    digest = hashlib.sha256(json.dumps([str(part) for part in key]).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
    return np.atleast_1d(np.asarray(generator.random_raw(count), dtype=np.uint64))


def fingerprint_of(
    manifest: DataManifest,
    tokenizer: Tokenizer,
    *,
    split: str,
    epoch: int,
    shard: int,
    seed: int,
    row_len: int,
    case_aug: float,
) -> str:
    """Identity of packed rows: two with the same one hold the same bytes."""
    data = manifest.split_sha256(split, shard)
    parts = [_VERSION, data, tokenizer.sha256, split, epoch, seed, row_len, case_aug, *_named(shard)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def sequence_fingerprint(
    manifest: DataManifest,
    tokenizer: Tokenizer,
    *,
    split: str,
    seed: int,
    row_len: int,
    case_aug: float,
    order: str,
) -> str:
    """Identity of the rows of all epochs in the order in which a run reads them."""
    parts = [_VERSION, manifest.split_sha256(split), tokenizer.sha256, split, None, seed, row_len, case_aug]
    several = ["by shard", order] if len(manifest.shards_of(split)) > 1 else []
    return hashlib.sha256(json.dumps([*parts, *several]).encode()).hexdigest()


def shard_key(seed: int, epoch: int, shard: int, purpose: str) -> tuple[object, ...]:
    """Key of the random bits for a purpose: of the first shard that of a corpus which has no other."""
    return seed, epoch, *_named(shard), purpose


def _named(shard: int) -> list[str]:
    return [f"shard {shard}"] if shard else []


def pack(
    data_dir: Path,
    tokenizer: Tokenizer,
    out_dir: Path,
    *,
    split: str = "train",
    epoch: int = 0,
    shard: int = 0,
    seed: int = 0,
    row_len: int,
    case_aug_prob: float = 0.15,
    verify: bool = False,
    lasting: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> PackedRows:
    """Pack a shard for an epoch unless the same rows are there already. Validation is neither shuffled nor augmented.

    Rows of something else, and such as are not complete, are packed again; with ``verify`` those of which a byte has
    changed, too. ``lasting`` rows are left by a run that has read them.

    Case augmentation (training): with ``case_aug_prob`` a document is lowered (80 %) or uppered (20 %) before
    encoding, drawn per document and epoch. Raises UserError if the text does not fill one row; of several shards one
    may be that short, and has no rows.
    """
    if row_len < 4 or not 0 <= case_aug_prob <= 1:
        raise UserError(f"row_len {row_len} must be at least 4 and case_aug_prob {case_aug_prob} in [0, 1]")
    out_dir = Path(out_dir)
    manifest = load_manifest(data_dir)
    training, shards = split == "train", manifest.shards_of(split)
    case_aug_prob = case_aug_prob if training else 0.0
    settings: dict[str, Any] = {"split": split, "epoch": epoch, "shard": shard, "seed": seed, "row_len": row_len}
    fingerprint = fingerprint_of(manifest, tokenizer, **settings, case_aug=case_aug_prob)
    facts = load_facts(out_dir, split, epoch, shard, fingerprint, log)
    if facts and are_complete(out_dir, facts) and (not verify or is_sound(out_dir, facts, log)):
        return facts
    documents = shards[shard].documents
    case = _draw_cases(documents, case_aug_prob, *shard_key(seed, epoch, shard, "case"))
    with disk_errors(out_dir), folder_for(out_dir):
        require_space(out_dir, 2 * shards[shard].bytes)
        sweep(out_dir)
        with partial_file(out_dir) as (encoded, flat):
            lengths = _encode_all(read_documents(data_dir, split, shard), tokenizer, case, encoded)
            order = heads = None
            if training:
                order = np.argsort(random_bits(documents, *shard_key(seed, epoch, shard, "documents")), kind="stable")
                heads = (random_bits(documents, *shard_key(seed, epoch, shard, "heads")) & np.uint64(1)).astype(bool)
            index = RowIndex(*lay_out_rows(lengths, row_len, order, heads), case)
            if len(index.first) < 2 and len(shards) == 1:
                raise too_little(split, int(lengths.sum()), row_len)
            rows = _fill_rows(flat, lengths, index, row_len, tokenizer.bos_id)
            write_rows(out_dir, split, epoch, shard, rows, index)
    made = PackedRows(
        fingerprint=fingerprint,
        **settings,
        data=manifest.split_sha256(split, shard),
        tokenizer=tokenizer.sha256,
        case_aug_prob=case_aug_prob,
        lasting=lasting,
        **_counts(index, lengths, row_len),
    )
    facts = write_facts(out_dir, made)
    log(
        f"rows: {split} epoch {epoch}{f' shard {shard}' if len(shards) > 1 else ''}: {facts.rows:,} rows of {row_len}, "
        f"{100 * facts.kept_fraction:.2f} % of {facts.document_tokens:,} tokens kept"
    )
    return facts


def too_little(split: str, tokens: int, row_len: int) -> UserError:
    """What is wrong with a split that does not fill one row."""
    return UserError(
        f"too little text for one row of {row_len}: the {split} split has {tokens:,} tokens; "
        "use more text or a shorter row"
    )


def is_sound(out_dir: Path, facts: PackedRows, log: Callable[[str], None]) -> bool:
    """Whether every byte is what was written; a line of log names the file where one is not."""
    try:
        verify_rows(out_dir, facts)
    except UserError as error:
        log(f"rows: {str(error).partition(';')[0]}; they are packed again")
        return False
    return True


def _counts(index: RowIndex, lengths: np.ndarray, row_len: int) -> dict[str, Any]:
    """What facts count. ``lengths`` int64 [documents]: in tokens, without BOS."""
    cut = np.unique(index.document[index.length < lengths[index.document]])
    return {
        "rows": len(index.first) - 1,
        "documents": len(lengths),
        "document_tokens": int(lengths.sum()),
        "kept_fraction": float(index.length.sum() / lengths.sum()) if len(lengths) else 1.0,
        "fragments": len(index.document),
        "needless_cuts": int((lengths[cut] < row_len).sum()),
        "lowered": int((index.case == 1).sum()),
        "uppered": int((index.case == 2).sum()),
    }


def apply_case(text: str, case: int) -> str:
    """The text as augmented: index into ``CASES``."""
    return text.lower() if case == 1 else text.upper() if case == 2 else text


def _draw_cases(documents: int, probability: float, *key: object) -> np.ndarray:
    drawn = random_bits(2 * documents, *key).astype(np.float64).reshape(2, documents) / 2.0**64
    return np.where(drawn[0] < probability, np.where(drawn[1] < _LOWER_SHARE, 1, 2), 0).astype(np.uint8)


def _encode_all(documents: Iterator[Document], tokenizer: Tokenizer, case: np.ndarray, file: IO[bytes]) -> np.ndarray:
    """Write every document's ids (uint16, no BOS) to ``file``; int64 [documents] lengths."""
    lengths: list[int] = []
    for texts in _batches(apply_case(document.text, case[i]) for i, document in enumerate(documents)):
        for ids in tokenizer.encode_batch(texts):
            lengths.append(len(ids))
            file.write(ids.tobytes())
    file.flush()
    return np.array(lengths, dtype=np.int64)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _fill_rows(
    flat: Path, lengths: np.ndarray, index: RowIndex, row_len: int, bos_id: int
) -> Iterator[NDArray[np.uint16]]:
    """uint16 [row_len] of every row, from the documents' ids in ``flat``."""
    if len(index.first) < 2:
        return
    tokens = np.memmap(flat, dtype=np.uint16, mode="r")
    offsets = np.concatenate([[0], np.cumsum(lengths)])[index.document] + index.start
    for row in range(len(index.first) - 1):
        values = np.full(row_len, bos_id, dtype=np.uint16)
        at = 1
        for fragment in range(index.first[row], index.first[row + 1]):
            count = index.length[fragment]
            values[at : at + count] = tokens[offsets[fragment] : offsets[fragment] + count]
            at += count + 1
        yield values
