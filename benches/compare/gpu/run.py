#!/usr/bin/env python3
"""Times gatefold and other libraries on one GPU, on the same inputs, and writes ratios into benches/results.

    python benches/compare/gpu/run.py --bench PATH --machine h200 [--only prefill,moe] [--rounds 5] [--results DIR]

PATH is the bench `cuda` as `cargo bench --bench cuda --no-run` builds it; the machine that runs this needs no Rust. For each case
gatefold makes the inputs, checks its answers against its reference and writes both as files; every peer computes the same, and its
answers are compared with gatefold's: a difference ends the run. Then come rounds, in an order that rotates. A call is timed on the
GPU, between two events, after a kernel that fills the L2 cache with something else; a ratio is formed in each round.
"""

import argparse
import datetime
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE.parent / "cpu"))

import numpy as np
import torch
from peer import Arrays
from peers import KINDS
from run import Program, near_ties, read, row_errors

# Largest error of a row over its length, peer against gatefold: the peers round between steps.
TOLERANCES = {"f32": 1e-3, "bf16": 3e-2, "f16": 4e-3}
FLUSH_BYTES = 256 << 20  # five times the L2 cache of an H200


class Clock:
    """Seconds of calls on the GPU."""

    def __init__(self):
        self.other = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, call, calls):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self.other.zero_()  # also keeps the GPU busy while the host queues the call
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def compare(folder, kind, dtype, name, answers):
    """The largest error of a peer's answer, and a note; ends the run if the answer is another."""

    def fail(problem):
        sys.exit(f"{name}: {problem}; inputs and answers are in {folder}")

    truth, got = read(folder, "out"), answers["out"].float().cpu().numpy()
    if got.size != truth.size:
        fail(f"{got.size} numbers, gatefold has {truth.size}")
    errors, note = row_errors(got, truth), ""
    if kind == "routing":
        logits, ids = read(folder, "logits"), read(folder, "ids")
        theirs = answers["ids"].cpu().numpy()
        if not np.array_equal(np.take_along_axis(logits, theirs, 1), np.take_along_axis(logits, ids, 1)):
            fail("other experts")
    bad = errors > TOLERANCES[dtype]
    if kind == "moe" and bad.any():
        excused = bad & near_ties(folder, dtype)
        note = f"{excused.sum()} of {bad.size} tokens with other experts (tied logits)"
        errors, bad = errors[~excused], bad[~excused]
    if bad.any():
        fail(f"{bad.sum()} of {bad.size} rows differ, the worst by {errors.max():.1e}, allowed are {TOLERANCES[dtype]:.0e}")
    return float(errors.max()), note


def gpu_state():
    """Clocks, power and temperature now."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return dict(zip(fields.split(","), values))


def measure(ours, case, clock, options):
    folder = Path(tempfile.mkdtemp(prefix="gatefold-", dir=options.scratch))
    about = ours.ask("prepare", case, folder)
    kind, dtype = about["kind"], about["dtype"]
    rows = [{"variant": "gatefold", "run": lambda calls: ours.ask("run", calls)["seconds"], "error": 0.0, "note": ""}]
    missing = {}
    for name, start in KINDS[kind](Arrays(folder)).items():
        try:
            call = start()
            answers = call()
        except Exception as error:  # a peer may lack the type or the operation: told, not hidden
            missing[f"{case} {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        error, note = compare(folder, kind, dtype, f"{case}, {name}", answers)
        rows.append({"variant": name, "run": lambda calls, call=call: clock.seconds(call, calls), "error": error, "note": note})
        del answers
    for row in rows:
        row["run"](2)
        first = min(row["run"](3))
        row |= {"calls": max(3, min(50, round(options.seconds / (first + 1e-4)))), "medians": [], "fastest": [], "states": []}
    for number in range(options.rounds):
        turn = number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            seconds = row["run"](row["calls"])
            row["medians"].append(statistics.median(seconds))
            row["fastest"].append(min(seconds))
            row["states"].append(gpu_state())
    results = []
    for row in rows:
        ratios = [theirs / own for theirs, own in zip(row["medians"], rows[0]["medians"])]
        results.append(
            {
                "case": case,
                "kind": kind,
                "dtype": dtype,
                "variant": row["variant"],
                "median_us": 1e6 * statistics.median(row["medians"]),
                "fastest_us": 1e6 * min(row["fastest"]),
                "ratios": ratios,
                "ratio": statistics.median(ratios),
                "error": row["error"],
                "note": row["note"],
                "flops": about["flops"],
                "bytes": about["bytes"],
                "clocks_sm": sorted({state["clocks.sm"] for state in row["states"]}),
                "power_w": statistics.median(float(state["power.draw"]) for state in row["states"]),
            }
        )
        last = results[-1]
        print(f"{case:40} {last['variant']:30} {last['median_us']:10.1f} us  x {last['ratio']:.2f}  {last['note']}", flush=True)
    shutil.rmtree(folder)  # kept where an answer was wrong
    torch.cuda.empty_cache()
    return results, missing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True, help="the built bench `cuda`")
    parser.add_argument("--machine", required=True, help="short name of the GPU, for the file's name")
    parser.add_argument("--commit", default="", help="what was built, for the report")
    parser.add_argument("--only", default="", help="cases whose name contains one of these, as prefill,moe/qwen3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of calls of each program in each round")
    parser.add_argument("--scratch", default="/dev/shm", help="folder for inputs: some GB")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    options = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    ours, clock = Program("gatefold", [options.bench, "--serve"]), Clock()
    device = ours.ask("device")
    wanted = [name for name in options.only.split(",") if name]
    cases = [case for case in ours.ask("list")["cases"] if not wanted or any(name in case for name in wanted)]
    results, missing = [], {}
    for case in cases:
        rows, failed = measure(ours, case, clock, options)
        results += rows
        missing |= failed
    ours.close()
    report = {
        "machine": options.machine,
        "date": datetime.date.today().isoformat(),
        "device": device,
        "state": gpu_state(),
        "commit": options.commit,
        "command": shlex.join(["python", "benches/compare/gpu/run.py", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "CUDA": torch.version.cuda},
        "rounds": options.rounds,
        "missing": missing,
        "results": results,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.machine}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
