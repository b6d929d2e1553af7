"""Generate `djinn.v1` (messages, gRPC stubs and their types) from protos/djinn.

python tools/generate_protos.py           writes protos/gen/djinn
python tools/generate_protos.py --check   regenerates elsewhere and fails on a difference

`google.rpc` is not generated: the package googleapis-common-protos brings it.
"""

import argparse
import difflib
import itertools
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = PROTOS / "gen" / "djinn"

PACKAGE_FILES = {
    "__init__.py": '"""Djinn\'s wire protocol: generated code."""\n',
    "v1/__init__.py": (
        '"""Version 1 of Djinn\'s wire protocol, generated from protos/djinn/v1."""\n'
    ),
    "py.typed": "",
}


def generate(out: Path) -> None:
    """Write the whole package `djinn` into the folder `out`."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("djinn/**/*.proto"))
    if not sources:
        raise SystemExit(f"no .proto files under {PROTOS / 'djinn'}")
    scripts = sysconfig.get_path("scripts")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources,
        ],
        check=True,
        env={**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])},
    )
    for name, text in PACKAGE_FILES.items():
        (out / "djinn" / name).write_text(text, encoding="utf-8")


def read_tree(folder: Path) -> dict[str, str]:
    """Return each generated file's text by its path below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Generate djinn.v1 from protos/djinn.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if they differ")
    check = parser.parse_args().check

    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        wanted = read_tree(Path(temporary) / "djinn")
    present = read_tree(GENERATED)

    if check:
        for name in sorted(wanted.keys() | present.keys()):
            before, after = present.get(name, ""), wanted.get(name, "")
            sides = f"present/{name}", f"wanted/{name}"
            diff = difflib.unified_diff(before.splitlines(), after.splitlines(), *sides, n=1)
            for line in itertools.islice(diff, 20):
                print(line.rstrip())
        if wanted != present:
            print("protos/gen differs from what protos/djinn gives: run `make proto`")
            return 1
        return 0

    for name in present.keys() - wanted.keys():
        (GENERATED / name).unlink()
    for name, text in wanted.items():
        if present.get(name) != text:
            target = GENERATED / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
