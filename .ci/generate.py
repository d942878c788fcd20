"""Writes the code and stubs of every `.proto` file beside it, or below a folder given with --out.

The code is committed, so that using the project needs no protoc. A test runs this and compares.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hci", "arbiter")


def generate(out: Path) -> list[Path]:
    """Runs protoc with mypy-protobuf's plugins; returns the `.proto` files that were compiled."""
    protos = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.proto"))
    if not protos:
        return []
    # The plugins are in the environment of the Python that runs this, which need not be on PATH.
    programs = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={ROOT}",
        f"--plugin=protoc-gen-mypy={programs / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={programs / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *(str(path.relative_to(ROOT)) for path in protos),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    return protos


def main() -> None:
    """Command line: `--out DIR`, by default the source tree itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT)
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
