"""A release folder: everything of one step that a stranger needs, checked before it gets its name.

``model.safetensors``, ``config.json`` (with this step's WAND bounds, margins and the auto_map),
``generation_config.json``, the tokenizer, the model code (the same bytes in every revision), ``analysis.json`` and the
sums behind it, ``release.json``, the trajectory up to this step, ``README.md`` (the card, rendered from these),
``LICENSE``, ``NOTICE`` and ``MANIFEST.sha256``.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cognica_poe.analysis.agreement import config_margins
from cognica_poe.data.tokenizer import export_tokenizer, load_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import (
    MANIFEST,
    Manifest,
    atomic_folder,
    read_json,
    require_replaceable,
    require_space,
    safe_name,
    sha256_file,
    verify_manifest,
    write_bytes,
    write_json,
)
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.checkpoints import TABLE, TRAJECTORY, Line, as_csv, as_jsonl, line_of
from cognica_poe.release.contents import check_contents
from cognica_poe.seals import require_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

WEIGHTS = "model.safetensors"
"""File of the weights."""
REQUIRED = (
    WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "analysis.json",
    "release.json", "README.md", "LICENSE", "modeling_cognica_poe.py", "configuration_cognica_poe.py",
)  # fmt: skip
"""Files that every release holds, among others."""
READ_BY_LOADERS = (".json", ".safetensors", ".bin", ".pt", ".py", ".jinja", ".model", ".txt")
"""Ends of names that transformers and its tokenizers look for; a file of another kind changes nothing of what loads."""
SUMS = "analysis.documents.npz"
"""File of the record's sums per document and prompt, from which the card of several steps computes changes."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_PROBE = 24  # tokens of the reload check


@dataclass(frozen=True)
class Release:
    """A release folder that passed ``check_release``."""

    path: Path
    step: int
    weights_sha256: str
    """Of the file ``model.safetensors``."""
    config: dict[str, Any]
    record: dict[str, Any]
    """The analysis record of this step."""
    about: dict[str, Any]
    """``release.json``: name, step, repo_id, license and what else the card says beside the record."""


def export_release(
    model: CognicaPoEForCausalLM,
    tokenizer_dir: Path,
    out: Path,
    *,
    record: Mapping[str, Any],
    wand_bounds: Sequence[float],
    name: str,
    step: int,
    repo_id: str | None = None,
    about: Mapping[str, Any] | None = None,
    sums: Path | None = None,
    earlier: Sequence[Path] = (),
    dtype: str = "float32",
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the release folder ``out`` of ``model`` at ``step``, or nothing at all; returns ``out``.

    ``record``: the step's analysis record (JSON layout); the margins of its exit rules go into the config, as do
    ``wand_bounds`` [K-1], nats. ``about``: what the card says beside the record (``license``, ``languages``,
    ``description``, ``data``). ``sums``: the file beside the record, where there is one. ``earlier``: release folders
    of steps before this one, for its trajectory. ``dtype``: of the stored weights. The model is left as it was. Raises
    UserError when ``out`` holds anything but a release, when record, bounds, tokenizer and weights do not belong
    together, or the written folder does not give back the same weights and logits.
    """
    out = Path(out)
    require_replaceable(out, "release")
    data = _plain(record)
    stored = _DTYPES.get(dtype)
    if stored is None:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    _check_record(model, data, step, list(wand_bounds))
    size = sum(tensor.numel() for tensor in model.state_dict().values()) * stored.itemsize
    require_space(out, int(1.05 * size) + 16_000_000)
    bos_id = _check_tokenizer(Path(tokenizer_dir), model.config.vocab_size)
    described = {"name": name, "step": step, "repo_id": repo_id or name, **dict(about or {})}
    with atomic_folder(out, "release", wait=600.0) as folder:  # of another export of this step
        margins = config_margins(data.get("exit_rules") or [])
        with _as_released(model, list(wand_bounds), margins, bos_id, stored) as state:
            model.save_pretrained(folder, state_dict=dict(state), max_shard_size=2 * size + 1_000_000)
            config = read_json(folder / "config.json", "model configuration")
            write_json(folder / "config.json", {**config, "dtype": dtype})
            _compare(model, state, folder, stored)
        export_tokenizer(Path(tokenizer_dir), folder, model.config.max_position_embeddings)
        write_json(folder / "analysis.json", data)
        if sums is not None:
            require_sha256(sums, data.get("documents_sha256") or "that of no sums", "sums", "analyze this step again")
            write_bytes(folder / SUMS, sums.read_bytes())
        write_json(folder / "release.json", _plain(described))
        lines = [*map(_line_of_folder, earlier), line_of(data, described, sha256_file(folder / WEIGHTS))]
        write_bytes(folder / TRAJECTORY, as_jsonl(lines))
        write_bytes(folder / TABLE, as_csv(lines))
        write_bytes(folder / "README.md", card_of(folder).encode())
        for name in ("LICENSE", "NOTICE"):
            write_bytes(folder / name, _notice(name).encode())
    check_release(out)
    log(f"release: step {step} written to {out} ({size / 1e6:.1f} MB of weights, {dtype})")
    return out


def _line_of_folder(folder: Path) -> Line:
    """The line of an earlier step, whose commit its folder does not know."""
    record = read_json(folder / "analysis.json", "analysis record")
    about = read_json(folder / "release.json", "release description")
    return line_of(record, about, Manifest.read(folder).digests[WEIGHTS])


def card_of(folder: Path) -> str:
    """The card of a release folder, rendered from its ``analysis.json``, ``release.json``, ``config.json`` and
    ``trajectory.jsonl``."""
    about = read_json(folder / "release.json", "release description")
    config = read_json(folder / "config.json", "model configuration")
    lines = [json.loads(line) for line in (folder / TRAJECTORY).read_text(encoding="utf-8").splitlines()]
    record = read_json(folder / "analysis.json", "analysis record")
    return render_card([record], {**about, "config": config, "trajectory": lines})


def check_release(path: Path, *, to_load: bool = False) -> Release:
    """Check a release folder: complete, unaltered, readable, of one step. Raises UserError naming the first fault.

    A folder that is passed on holds nothing else. One ``to_load`` may: a revision of a repository to which others added
    a picture or another format, as long as no loader reads it.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"release folder not found: {path}; make it with `cognica-poe export`")
    verify_manifest(path)
    for name in REQUIRED:
        if not (path / name).is_file():
            raise UserError(f"{path} has no {name}: it is no complete release; export it again")
    listed = {safe_name(name, f"{path / MANIFEST}: file name") for name in Manifest.read(path).digests}
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    extra = sorted(present - listed - {MANIFEST})
    if to_load:
        extra = [name for name in extra if Path(name).suffix in READ_BY_LOADERS]
    if extra:
        why = "a loader might read it" if to_load else "a release holds nothing else"
        raise UserError(f"{path / extra[0]} is not in {MANIFEST}: {why}; remove it")
    _check_weights(path / WEIGHTS)
    record = _read_object(path / "analysis.json", "analysis record")
    about = _read_object(path / "release.json", "release description")
    config = _read_object(path / "config.json", "model configuration")
    step = about.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{path / 'release.json'}: step is {step!r}; it must be a whole number, 0 or more")
    if record.get("step") != step:
        raise UserError(f"{path}: the record is of step {record.get('step')!r}, the release of step {step}")
    return Release(path, step, sha256_file(path / WEIGHTS), config, record, about)


def _read_object(file: Path, what: str) -> dict[str, Any]:
    value = read_json(file, what)
    if not isinstance(value, dict):
        raise UserError(f"{what} {file} is no JSON object; export it again")
    return value


def load_release(
    path: Path, dtype: torch.dtype | str = "auto"
) -> tuple[CognicaPoEForCausalLM, PreTrainedTokenizerBase]:
    """``(model in evaluation mode, tokenizer)`` of a release folder, after ``check_release``; runs no code from it."""
    from transformers import AutoTokenizer

    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

    check_release(path, to_load=True)
    check_contents(path)
    model = CognicaPoEForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy through JSON: what a reader of the file will see."""
    return json.loads(json.dumps(dict(value), allow_nan=False))


def _check_record(model: CognicaPoEForCausalLM, record: Mapping[str, Any], step: int, bounds: list[float]) -> None:
    from cognica_poe.analysis.analyzer import weights_sha256

    if record.get("step") != step:
        raise UserError(f"the analysis record is of step {record.get('step')}, not {step}: analyze this step first")
    if record["model"].get("weights_sha256") != weights_sha256(model):
        raise UserError(f"the analysis record of step {step} was measured on other weights: run analyze on it again")
    transitions = model.config.num_stages - 1
    if len(bounds) != transitions:
        raise UserError(f"{len(bounds)} WAND bounds for {transitions} transitions between stages: calibrate again")


def _check_tokenizer(folder: Path, vocab_size: int) -> int:
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"tokenizer {folder} has {tokenizer.vocab_size} ids, the model {vocab_size}: not its tokenizer")
    return tokenizer.bos_id


@contextlib.contextmanager
def _as_released(
    model: CognicaPoEForCausalLM, bounds: list[float], margins: Mapping[str, Any], bos_id: int, dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the state dict to store; meanwhile the model carries the released configuration, then its own again."""
    before = model.config, model.generation_config
    config = copy.deepcopy(model.config)
    generation = copy.deepcopy(model.generation_config)
    config.poe_wand_p99_bounds_per_stage_head = [float(bound) for bound in bounds]
    for field, value in margins.items():
        setattr(config, field, value)
    for part in (config, generation):  # BOS starts every document, so it ends generation and serves as padding
        part.bos_token_id = part.eos_token_id = part.pad_token_id = bos_id
    type(config).register_for_auto_class()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    try:
        model.config, model.generation_config = config, generation
        yield state
    finally:
        model.config, model.generation_config = before


def _compare(model: CognicaPoEForCausalLM, state: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Read the folder back: weights equal to the bit, and logits equal where the dtype is the model's own."""
    again = type(model).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    again.to(model.device)  # type: ignore[arg-type]  # transformers hides the signature behind a wrapper
    loaded = again.state_dict()
    wrong = [name for name in state if name not in loaded or not torch.equal(loaded[name].cpu(), state[name])]
    if wrong or len(loaded) != len(state):
        raise UserError(f"{folder.name}: {wrong[:1] or 'a parameter'} differs after reloading; the disk may be failing")
    ids = torch.arange(1, _PROBE + 1, device=model.device)[None] * 7919 % model.config.vocab_size
    training = model.training
    with torch.no_grad():
        model.eval()
        logits, expected = again(input_ids=ids).logits, model(input_ids=ids).logits
        model.train(training)
    if not torch.isfinite(logits).all():
        raise UserError(f"the model gives logits that are not finite in {dtype}: do not release this step")
    if dtype == model.dtype and not torch.equal(logits, expected):
        raise UserError("the reloaded release gives other logits than the model it was made from")


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no readable safetensors file ({error}); export it again") from error
    if not names:
        raise UserError(f"{file} holds no tensor; export it again")


def _notice(name: str) -> str:
    """``LICENSE`` or ``NOTICE``, from the source tree or the installed package."""
    from importlib import metadata

    installed = [Path(file.locate()) for file in metadata.files("cognica-poe") or [] if file.name == name]
    for file in [Path(__file__).parents[2] / name, *installed]:
        if file.is_file() and file.stat().st_size:
            return file.read_text(encoding="utf-8")
    raise UserError(f"the package's {name} file is missing: install cognica-poe again")
