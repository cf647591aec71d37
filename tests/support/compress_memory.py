"""One compression in a process of its own; prints the memory it took beyond what importing takes.

``python compress_memory.py FOLDER JSON``: compress FOLDER/moe with FOLDER/dense as JSON's keyword arguments say. A stack of
experts is then what a run may hold 3 of, so the peak is of this process alone: resident memory, its greatest since the
imports.
"""

import json
import sys
from pathlib import Path


def read_kib(field: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main(folder: Path, keys: dict) -> None:
    # Whatever is loaded on first use: a linear algebra library, activation tables, configurations.
    import torch

    from hf_moe_ext.convert import compress

    torch.linalg.svd(torch.randn(64, 64))
    compress(folder / "warm" / "moe", folder / "warm_out", parent=folder / "warm" / "dense", overwrite=True, **keys)
    # Peak so far is forgotten: what follows is of the compression.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = read_kib("VmRSS")
    report = compress(folder / "moe", folder / "out", parent=folder / "dense", overwrite=True, **keys)
    peak = read_kib("VmHWM") - before
    print(json.dumps({"peak": peak * 1024, "stack": report.largest_stack_bytes, "source": report.file_bytes_before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
