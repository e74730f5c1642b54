#!/usr/bin/env python3
"""What runs on the machine with the GPU, out of the folder that `carry.py` made; needs no Rust.

    python3 .carry/there.py STEP... [--minutes 9] [--out DIR]

    info       GPU, driver, what the programs were built from
    tests      tests of the CUDA backend on the GPU alone; a missing GPU is a failure
    golden     the golden files, where the repository's tests/golden is at hand
    sanitize   a part of the tests under compute-sanitizer: memcheck, synccheck, racecheck, initcheck
    layer      the example `layer` for models of several kinds
    bench      gatefold and PyTorch: JSON and a table; given again, it goes on where it ended

Each step writes STEP.log into DIR. All of a command's steps together end within --minutes: what is left over is told.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACE = Path(tempfile.gettempdir()) / "gatefold"
MODELS = ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v2-lite", "gpt-oss-20b"]
# The kernels of every family once: everything would take hours under these tools.
SANITIZED = ["qwen3_moe", "deepseek_v3", "gpt_oss"]
TOOLS = ["memcheck", "synccheck", "racecheck", "initcheck"]


class Run:
    """Commands until the time is over."""

    def __init__(self, minutes, out):
        self.end, self.out, self.failed = time.monotonic() + 60 * minutes, out, []

    def left(self):
        return self.end - time.monotonic()

    def command(self, step, *command, seconds=None, file=None):
        """Runs it with its output in the step's log (or its standard output in a file); gives whether it went well."""
        command = [str(part) for part in command]
        limit = min(self.left(), seconds or 1e9)
        if limit < 5:
            self.failed.append(f"{step}: no time left for {' '.join(command)}")
            return False
        environment = os.environ | {
            "GATEFOLD_REQUIRE_CUDA": "1",
            "GATEFOLD_SIMULATOR": "0",
            # What the driver compiles is kept: every test loads the kernels anew.
            "CUDA_CACHE_PATH": str(PLACE / "cuda-cache"),
            "CUDA_CACHE_MAXSIZE": str(4 << 30),
            "PYTHONUNBUFFERED": "1",
            "RUST_BACKTRACE": "1",
        }
        log = self.out / f"{step}.log"
        with open(log, "a") as told, open(file or log, "w" if file else "a") as out:
            told.write(f"$ {' '.join(command)}\n")
            told.flush()
            start = time.monotonic()
            try:
                process = subprocess.Popen(command, cwd=PLACE, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=told)
                status = process.wait(timeout=limit)
            except OSError as error:
                status = str(error)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = f"over {limit:.0f} s"
            told.write(f"[{status}, {time.monotonic() - start:.1f} s]\n")
        print(f"{step}: {' '.join(command)[:100]}: {status}, {time.monotonic() - start:.1f} s", flush=True)
        if status != 0:
            self.failed.append(f"{step}: {' '.join(command)}: {status}")
        return status == 0


def info(run):
    run.command("info", "nvidia-smi")
    print(f"commit {(PLACE / 'bin' / 'commit').read_text()}")


def tests(run):
    run.command("tests", "bin/test_device_layer", "--test-threads", "4")
    run.command("tests", "bin/test_cuda", "--test-threads", "4")


def golden(run):
    folder = Path.cwd() / "tests" / "golden"
    if not folder.is_dir():
        run.failed.append(f"golden: no folder {folder}: start this in the repository")
        return
    for dtype in ["f32", "bf16", "f16"]:
        run.command("golden", "bin/golden", folder, "--backend", "cuda", "--dtype", dtype)


def sanitize(run):
    # Whole layers launch most kernels; the first command also fills the cache of compiled kernels.
    if shutil.which("compute-sanitizer") is None:
        run.failed.append("sanitize: there is no compute-sanitizer")
        return
    for number, tool in enumerate(TOOLS):
        share = run.left() / (len(TOOLS) - number)
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        run.command("sanitize", *check, "bin/test_device_layer", "--test-threads", "1", *SANITIZED, seconds=share)


def layer(run):
    for model in MODELS:
        config, file = f"tests/configs/{model}.json", run.out / f"layer-{model}.json"
        run.command("layer", "bin/layer", "--model", config, "--device", "cuda", "--json", file=file)


def bench(run):
    results, machine = PLACE / "results", "gpu"
    try:
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30).stdout
        machine = names.splitlines()[0].removeprefix("NVIDIA ").split(" ")[0].lower()
    except (OSError, IndexError, subprocess.SubprocessError):
        pass
    minutes = max(0.1, run.left() / 60 - 1.5)  # the last case may take longer
    command = [sys.executable, "benches/compare/gpu/run.py", "--bench", PLACE / "bin" / "bench_cuda", "--machine", machine]
    commit = (PLACE / "bin" / "commit").read_text()
    run.command("bench", *command, "--commit", commit, "--results", results, "--minutes", f"{minutes:.1f}")
    found = sorted(results.glob("*.json"))
    for path in found:
        shutil.copy(path, run.out)
    if found:
        run.command("bench", sys.executable, "benches/compare/gpu/table.py", *found, file=run.out / "table.md")


STEPS = {step.__name__: step for step in [info, tests, golden, sanitize, layer, bench]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS, metavar="STEP")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    options = parser.parse_args()
    run = Run(options.minutes, options.out.resolve())
    run.out.mkdir(parents=True, exist_ok=True)
    archive = HERE / "gatefold.tar.xz"
    PLACE.mkdir(parents=True, exist_ok=True)
    stamp = PLACE / "stamp"
    if not stamp.exists() or stamp.read_text() != str(archive.stat().st_mtime_ns):
        with tarfile.open(archive) as files:
            files.extractall(PLACE, filter="data")
        stamp.write_text(str(archive.stat().st_mtime_ns))
    for step in options.steps:
        STEPS[step](run)
    for problem in run.failed:
        print(f"FAILED {problem}")
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
