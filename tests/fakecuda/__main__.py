"""Run all paths, or the named ones, and print what they found: ``python -m tests.fakecuda GUARD FOLDER [PATH]``."""

import ctypes
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # torch looks for a device once, when it is imported
    import torch

    from tests.fakecuda import device, paths

    torch.set_num_threads(1)
    run, wanted = paths.prepare(Path(sys.argv[2])), sys.argv[3:]
    device.install()
    found = {name: paths.report(path, run) for name, path in paths.paths().items() if name in wanted or not wanted}
    print(json.dumps({"paths": found, "faults": {} if wanted else paths.faults(run)}))
