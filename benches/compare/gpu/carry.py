#!/usr/bin/env python3
"""Builds what a machine with a GPU and without Rust needs, and gathers it in one folder, which git ignores:

    python benches/compare/gpu/carry.py [--folder .carry]

The folder holds `there.py` and an archive: the tests and the bench, the examples `layer` and `golden`, all without symbols, the models'
configurations, and the scripts beside this one. With that folder alone, the other machine runs `python3 .carry/there.py STEP`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LIMIT_MIB = 64


def built(*arguments):
    """Paths of the executables that cargo made, by the names of their targets."""
    command = ["cargo", *arguments, "--message-format=json-render-diagnostics"]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    return {m["target"]["name"]: Path(m["executable"]) for m in messages if m.get("reason") == "compiler-artifact" and m.get("executable")}


def newest_glibc(path):
    """The newest version of the C library that a program asks for."""
    text = subprocess.run(["objdump", "-T", path], capture_output=True, text=True).stdout
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_(\d+\.\d+)", text)}
    return ".".join(map(str, max(versions))) if versions else "not told"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".carry")
    folder = parser.parse_args().folder
    tests = built("test", "--no-run", "--test", "cuda", "--test", "device_layer")
    release = built("build", "--release", "--bench", "cuda", "--example", "layer", "--example", "golden")
    programs = {
        "test_cuda": tests["cuda"],
        "test_device_layer": tests["device_layer"],
        "bench_cuda": release["cuda"],
        "layer": release["layer"],
        "golden": release["golden"],
    }
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    for name, path in programs.items():
        subprocess.run(["strip", "--strip-all", "-o", folder / "bin" / name, path], check=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    (folder / "bin" / "commit").write_text(commit)
    data = [*ROOT.glob("tests/configs/*.json"), *ROOT.glob("tests/checkpoints/*/config.json")]
    data += [*ROOT.glob("benches/compare/gpu/*.py"), *ROOT.glob("benches/compare/cpu/*.py")]
    with tarfile.open(folder / "gatefold.tar.xz", "w:xz") as archive:
        archive.add(folder / "bin", "bin")
        for path in data:
            archive.add(path, path.relative_to(ROOT))
    glibc = newest_glibc(folder / "bin" / "test_cuda")
    shutil.rmtree(folder / "bin")
    shutil.copy(HERE / "there.py", folder)
    mib = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"{folder}: {mib:.1f} MiB, commit {commit}; asks for glibc {glibc} or newer")
    if mib > LIMIT_MIB:
        sys.exit(f"more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
