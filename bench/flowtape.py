"""Where the binary is that the scripts beside this one measure."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def binary():
    """The release binary, wherever cargo builds it; ends the script with advice where it was not built."""
    path = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "flowtape"
    if not path.exists():
        sys.exit(f"there is no {path}: run `cargo build --release` first")
    return path
