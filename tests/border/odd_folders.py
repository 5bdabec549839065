"""Binary files and manifests of runs and releases: missing, cut, spoilt, of another model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cognica_poe.files import MANIFEST
from tests.border.odd_files import OddFile, Spoil, to_folder


def broken_folders() -> Iterator[OddFile]:
    """Binary files of runs and releases: missing, cut, spoilt, of another model."""
    readers = {
        "run/release/step-4": (
            "model.safetensors",
            (
                "generate {release} Hi --max-new-tokens 4",
                "calibrate {release} --text {texts} --tokens 600",
                "publish {run} --to file:{new}",
                "serve {release} --port {port}",
                "bench decode {release} --prompts 1 --new-tokens 4 --dtype float32",
            ),
        ),
        "run/checkpoints/step-2": (
            "model.safetensors",
            ("export {run} --step 2 --out {new}", "analyze {run} --step 2"),
        ),
        "run/data": (
            "train-00000.parquet",
            (
                "tokenizer train {run}/data --out {new} --vocab-size 400",
                "data pack {run}/data --tokenizer {run}/tokenizer --out {new} --row-len 65",
            ),
        ),
    }
    spoils: dict[str, Spoil] = {
        "missing": lambda file: file.unlink(),
        "empty": lambda file: file.write_bytes(b""),
        "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "one bit": lambda file: file.write_bytes(
            file.read_bytes()[:-9] + bytes([file.read_bytes()[-9] ^ 1]) + file.read_bytes()[-8:]
        ),
        "noise": lambda file: file.write_bytes(bytes(range(256)) * 20),
        "a huge header": lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
        "a folder": to_folder,
    }
    for folder, (file, lines) in readers.items():
        for line in lines:
            for name, spoil in spoils.items():
                yield OddFile(f"{file}: {name}: {line.split('{')[0].strip()}", f"{folder}/{file}", spoil, line)
            for name, data in {
                "empty": b"",
                "noise": b"\xff\xfe",
                "a wrong line": b"abc  x\n",
                "a name outside": b"# cognica-poe release\n" + b"0" * 64 + b"  ../x\n",
            }.items():
                yield OddFile(
                    f"{MANIFEST}: {name}: {line.split('{')[0].strip()}",
                    f"{folder}/{MANIFEST}",
                    lambda path, data=data: path.write_bytes(data),
                    line,
                )
    line = readers["run/release/step-4"][1][0]
    for name, spoil in {**spoils, **_weights()}.items():
        if name not in ("missing", "a folder", "one bit"):
            yield OddFile(
                f"weights sealed: {name}", "run/release/step-4/model.safetensors", spoil, line, "run/release/step-4"
            )
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        yield OddFile(
            f"release without {name}, sealed",
            f"run/release/step-4/{name}",
            lambda file: file.unlink(),
            line,
            "run/release/step-4",
        )


def _weights() -> dict[str, Spoil]:
    import torch
    from safetensors.torch import load_file, save_file

    def changed(change: Callable[[dict[str, Any]], Any]) -> Spoil:
        def spoil(file: Path) -> None:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, {"format": "pt"})

        return spoil

    return {
        "no tensors": changed(lambda tensors: tensors.clear()),
        "a tensor missing": changed(lambda tensors: tensors.pop(sorted(tensors)[0])),
        "a tensor too many": changed(lambda tensors: tensors.update(extra=torch.zeros(3))),
        "a tensor of another shape": changed(lambda tensors: tensors.update({sorted(tensors)[0]: torch.zeros(3)})),
        "a tensor of whole numbers": changed(
            lambda tensors: tensors.update(
                {name: tensor.to(torch.int32) for name, tensor in tensors.items() if name == sorted(tensors)[0]}
            )
        ),
        "a tensor renamed": changed(lambda tensors: tensors.update(x=tensors.pop(sorted(tensors)[0]))),
    }
