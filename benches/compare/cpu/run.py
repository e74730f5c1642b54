#!/usr/bin/env python3
"""Times gatefold and other libraries back to back on the same inputs, and writes the ratios into benches/results.

    python benches/compare/cpu/run.py --machine NAME [--only W1,W5] [--dtype f32,bf16] [--rounds 7] [--threads 2]

Every library runs in a process of its own that waits for commands (`peer.py`). For each workload gatefold makes the inputs and
checks its answers against its reference; every peer computes the same, and its answers are compared with gatefold's: a difference
ends the run. `--add` puts rows into the report that this machine has for today, so that a run may be taken in steps. Then come rounds: in each, every program makes a few calls, in an order that rotates. A ratio is formed in each
round, from medians a second or two apart, so that other load on the machine hits both; the table has the median of the ratios.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
WORKLOADS = ["W1", "W2.1", "W2.8", "W3", "W4", "W5", "W6.1024", "W6.4096", "W7"]
# Largest error of a row over its length, peer against gatefold: the peers round between steps in bf16 and f16.
TOLERANCES = {"f32": 1e-4, "bf16": 3e-2, "f16": 4e-3}
# A unit in the last place, relative. Logits in the peer's type may be off by half of one each, two of them by one from each other;
# so may the scores of a softmax in that type, whose relative error is an absolute one of the logit.
ROUNDING = {"f32": 2**-20, "bf16": 2**-7, "f16": 2**-10}
QUIET = 0.2  # CPUs of others in an undisturbed round
PAUSE = 0.05  # seconds, for spinning threads of the last program to go to sleep


class Program:
    """A process that takes commands."""

    def __init__(self, name, command, environment=None):
        self.name = name
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )

    def ask(self, *fields):
        self.process.stdin.write("\t".join(map(str, fields)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended at: {' '.join(map(str, fields))}")
        answer = json.loads(line)
        if "error" in answer:
            sys.exit(f"{self.name}: {answer['error']}")
        return answer

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def run(self, variant, calls):
        """Seconds of each call, and how many CPUs other processes used meanwhile."""
        before, own, start = busy_seconds(), self.cpu_seconds(), time.perf_counter()
        seconds = self.ask("run", variant, calls)["seconds"]
        wall = time.perf_counter() - start
        others = (busy_seconds() - before - (self.cpu_seconds() - own)) / wall
        return seconds, max(0.0, others)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def busy_seconds():
    """CPU time of everything since the machine started."""
    fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------ comparing answers


def read(folder, name):
    """One of gatefold's arrays, widened."""
    entry = json.loads((folder / "arrays.json").read_text())[name]
    kinds = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16, "i32": np.int32}
    data = np.fromfile(folder / entry["file"], kinds[entry["dtype"]])
    if entry["dtype"] == "bf16":
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return data.reshape(entry["shape"])


def row_errors(got, truth):
    rows = truth.reshape(-1, truth.shape[-1]).astype(np.float64)
    errors = np.linalg.norm(got.reshape(rows.shape) - rows, axis=1) / np.maximum(np.linalg.norm(rows, axis=1), 1e-30)
    return np.where(np.isfinite(errors), errors, np.inf)


def near_ties(folder, dtype):
    """Tokens whose last chosen and first unchosen expert are so close that rounding the logits may exchange them."""
    x, router, ids = (read(folder, name) for name in ("x", "router", "ids"))
    logits = np.sort(x.reshape(-1, x.shape[-1]).astype(np.float64) @ router.astype(np.float64).T, axis=1)
    last, first = logits[:, -ids.shape[-1]], logits[:, -ids.shape[-1] - 1]
    return last - first <= ROUNDING[dtype] * (1 + np.maximum(np.abs(last), np.abs(first)))


def compare(folder, workload, dtype, variant):
    """The largest error of a peer's answer, and a note; ends the run if the answer is another."""

    def fail(problem):
        sys.exit(f"{workload} {dtype}, {variant}: {problem}; inputs and answers are in {folder}")

    truth = read(folder, "out")
    got = np.fromfile(folder / f"out.{variant}.bin", np.float32)
    if got.size != truth.size:
        fail(f"{got.size} numbers, gatefold has {truth.size}")
    if workload == "W7":
        logits, ids = read(folder, "logits"), read(folder, "ids")
        theirs = np.fromfile(folder / f"ids.{variant}.bin", np.float32).astype(np.int64).reshape(ids.shape)
        # Equal logits may be chosen in any order.
        if not np.array_equal(np.take_along_axis(logits, theirs, 1), np.take_along_axis(logits, ids, 1)):
            fail("other experts")
        error = float(np.abs(got.reshape(truth.shape) - truth).max())
        return (error, "") if error <= 1e-6 else fail(f"a weight differs by {error:.1e}")
    errors, note = row_errors(got, truth), ""
    bad = errors > TOLERANCES[dtype]
    if workload in ("W1", "W2.1", "W2.8", "W3") and bad.any():
        excused = bad & near_ties(folder, dtype)
        note = f"{excused.sum()} of {bad.size} tokens with other experts (tied logits)"
        errors, bad = errors[~excused], bad[~excused]
    if bad.any():
        fail(f"{bad.sum()} of {bad.size} rows differ, the worst by {errors.max():.1e}, allowed are {TOLERANCES[dtype]:.0e}")
    return float(errors.max()), note


# ------------------------------------------------------------------------------ timing


def wait_for_quiet(limit):
    """Until others use little while the programs sleep, `limit` seconds at most."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        busy, start = busy_seconds(), time.perf_counter()
        time.sleep(0.2)
        if (busy_seconds() - busy) / (time.perf_counter() - start) < QUIET:
            return


def summarise(result, ours):
    """Ratios and medians over the rounds in which neither was disturbed, or over all rounds where these are fewer than three."""
    quiet = [i for i, pair in enumerate(zip(result["others_cpus"], ours["others_cpus"])) if max(pair) < QUIET]
    used = quiet if len(quiet) >= 3 else range(len(ours["medians_ms"]))
    ratios = [result["medians_ms"][i] / ours["medians_ms"][i] for i in used]
    result |= {
        "quiet_rounds": len(quiet),
        "median_ms": statistics.median(result["medians_ms"][i] for i in used),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "fastest_ratio": result["fastest_ms"] / ours["fastest_ms"],
        "others_cpu": statistics.median(result["others_cpus"][i] for i in used),
    }


def measure(programs, workload, dtype, folder, options):
    """Rows of the table for one workload in one type."""
    ours, peers = programs[0], programs[1:]
    about = ours.ask("prepare", workload, dtype, folder)
    rows = [{"program": ours, "variant": "gatefold", "error": 0.0, "note": ""}]
    missing = {}
    for peer in peers:
        answer = peer.ask("prepare", workload, dtype, folder)
        missing |= answer["failed"]
        for variant in answer["variants"]:
            error, note = compare(folder, workload, dtype, variant)
            rows.append({"program": peer, "variant": variant, "error": error, "note": note})
    for row in rows:
        first = row["program"].run(row["variant"], 1)[0][0]
        calls = max(1, min(64, round(options.seconds / first)))
        row |= {"calls": calls, "is_short": first < 0.1, "medians": [], "fastest": [], "others": []}
    for number in range(options.rounds):
        wait_for_quiet(options.quiet)
        turn = number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            time.sleep(PAUSE)
            if row["is_short"]:
                row["program"].ask("run", row["variant"], 1)  # wakes its threads
            seconds, others = row["program"].run(row["variant"], row["calls"])
            row["medians"].append(statistics.median(seconds))
            row["fastest"].append(min(seconds))
            row["others"].append(others)
    results = []
    for row in rows:
        results.append(
            {
                "workload": workload,
                "about": about["about"],
                "dtype": dtype,
                "variant": row["variant"],
                "medians_ms": [1e3 * seconds for seconds in row["medians"]],
                "fastest_ms": min(row["fastest"]) * 1e3,
                "others_cpus": row["others"],
                "error": row["error"],
                "note": row["note"],
                "calls": row["calls"],
                "flops": about["flops"],
                "bytes": about["bytes"],
                "is_decode": about["is_decode"],
            }
        )
        summarise(results[-1], results[0])
        print(f"{workload:8} {dtype:5} {row['variant']:34} {results[-1]['median_ms']:10.3f} ms", end="")
        print(f"  x {results[-1]['ratio']:.2f}, of the fastest {results[-1]['fastest_ratio']:.2f}  error {row['error']:.0e}  {row['note']}", flush=True)
    for variant, why in missing.items():
        print(f"{workload:8} {dtype:5} {variant}: not there: {why}", flush=True)
    return results, {f"{workload} {dtype} {variant}": why for variant, why in missing.items()}, about


# ------------------------------------------------------------------------------ the report


def limit_seconds(result, limits):
    peak = limits["bf16_gflop_s"] if result["dtype"] == "bf16" and limits["bf16_gflop_s"] else limits["f32_gflop_s"]
    return max(result["flops"] / peak, result["bytes"] / limits["memory_gb_s"]) / 1e9


def table(report):
    """The report as Markdown."""
    limits = report["limits"]
    others = statistics.median(r["others_cpu"] for r in report["results"])
    lines = [
        f"# CPU, {report['machine']}, {report['date']}",
        "",
        f"{report['cpu']}, {report['threads']} threads, level `{report['level']}`. Limits, the best that any step of the run measured: "
        f"{limits['f32_gflop_s']:.0f} GFLOP/s (f32), {limits['bf16_gflop_s']:.0f} GFLOP/s (bf16 pairs), "
        f"{limits['memory_gb_s']:.1f} GB/s from memory, {limits['l3_gb_s']:.0f} from the third-level cache.",
        f"{', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
        f"{report['rounds']} rounds; in each, every program in turn. Commands:",
        "",
        *(f"    {command}" for command in report["commands"]),
        "",
        f"{report['remark'] + ' ' if report['remark'] else ''}Other processes used {others:.2f} CPUs meanwhile (median).",
        "",
        "Time: median over the rounds of each round's median call. Ratio: time of the peer over time of gatefold in the same round,",
        "median (least to greatest); below 1 the peer is faster. Fastest: the same ratio of the fastest calls of all rounds; on a busy",
        f"machine short calls find a quiet moment, long ones do not. Quiet: rounds in which others used less than {QUIET} CPUs during the",
        "calls of both; where there are three of them they alone count, elsewhere all do, and the row says little. Of limit: gatefold's",
        "share of what the machine allows, its median call (its fastest). Error: of the peer's answer against gatefold's, largest over",
        "all rows, relative to the row's length.",
        "",
        "| workload | type | gatefold | of limit | peer | its time | ratio | fastest | quiet | error |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    own = {(r["workload"], r["dtype"]): r for r in report["results"] if r["variant"] == "gatefold"}
    with_peers = {(r["workload"], r["dtype"]) for r in report["results"] if r["variant"] != "gatefold"}

    def left(ours):
        share = "–"
        if ours["flops"]:
            least = 1e5 * limit_seconds(ours, limits)
            share = f"{least / ours['median_ms']:.0f} % ({least / ours['fastest_ms']:.0f} %)"
        return f"| {ours['workload']}: {ours['about']} | {ours['dtype']} | {ms(ours['median_ms'])} | {share} "

    def ms(time):
        return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"

    def number(ratio):
        return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"

    for result in report["results"]:
        key = result["workload"], result["dtype"]
        if result["variant"] == "gatefold":
            lines += [left(result) + "| none | – | – | – | – | – |"] if key not in with_peers else []
            continue
        spread = f"({min(result['ratios']):.2f} to {max(result['ratios']):.2f})"
        error = f"{result['error']:.0e}" + (f"; {result['note']}" if result["note"] else "")
        lines.append(
            left(own[key]) + f"| {result['variant']} | {ms(result['median_ms'])} | {number(result['ratio'])} {spread} "
            f"| {number(result['fastest_ratio'])} | {result['quiet_rounds']} | {error} |"
        )
    if report["missing"]:
        lines += ["", "Not measured:", ""]
        lines += [f"* {what}: {why}" for what, why in report["missing"].items()]
    return "\n".join(lines) + "\n"


def cpu_name():
    text = Path("/proc/cpuinfo").read_text()
    get = lambda key: (re.search(rf"^{key}\s*: (.*)$", text, re.M) or ["", "?"])[1]
    return f"{get('model name')} (family {get('cpu family')}, model {get('model')}), {os.cpu_count()} CPUs, {platform.system()}"


def build(directory, *arguments):
    subprocess.run(["cargo", "build", "--release", *arguments], cwd=directory, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", required=True, help="short name of the machine, for the file's name")
    parser.add_argument("--only", default="W", help="workloads, as W1,W5; W2 means all whose name begins so")
    parser.add_argument("--dtype", default="f32,bf16")
    parser.add_argument("--peers", default="torch,onnxruntime,rust")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls of each program in each round")
    parser.add_argument("--quiet", type=float, default=5, help="seconds to wait for other load to end, before each round")
    parser.add_argument("--remark", default="", help="what a reader should know of the machine, for the report")
    parser.add_argument("--add", action="store_true", help="keep the other rows of today's report")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results", help="folder of the report")
    options = parser.parse_args()

    build(ROOT, "--example", "roofline")
    ours = Program("gatefold", [TARGET / "release/examples/roofline", "--serve", "--threads", options.threads])
    programs, versions = [ours], {}
    for peer in options.peers.split(","):
        if peer == "rust":
            build(HERE / "rust", "--target-dir", TARGET / "peers")
            command = [TARGET / "peers/release/gatefold-peers"]
        else:
            command = [sys.executable, HERE / f"peer_{peer}.py", options.threads]
        # candle and gemm take their threads from the first; the others must not start more than they are told to.
        threads = {"RAYON_NUM_THREADS": str(options.threads), "OMP_NUM_THREADS": str(options.threads)}
        programs.append(Program(peer, command, threads | {"HF_HUB_OFFLINE": "1"}))
        versions |= programs[-1].ask("versions")

    limits, results, missing = ours.ask("limits"), [], {}
    level = None
    for dtype in options.dtype.split(","):
        for workload in (w for w in WORKLOADS if any(w.startswith(name) for name in options.only.split(","))):
            if workload == "W7" and dtype != "f32":
                continue
            folder = Path(tempfile.mkdtemp(prefix="gatefold-"))
            rows, failed, about = measure(programs, workload, dtype, folder, options)
            shutil.rmtree(folder)  # kept where an answer was wrong
            level = about["level"]
            results += rows
            missing |= failed
    after = ours.ask("limits")
    for program in programs:
        program.close()
    limits = {name: max(value, after[name]) for name, value in limits.items()}
    commands = [shlex.join(["python", "benches/compare/cpu/run.py", *sys.argv[1:]])]
    threads = "" if options.threads == len(os.sched_getaffinity(0)) else f"-{options.threads}-thread{'s'[:options.threads - 1]}"
    stem = f"{options.results}/cpu-{options.machine}-{datetime.date.today().isoformat()}{threads}"
    if options.add and Path(f"{stem}.json").exists():
        before = json.loads(Path(f"{stem}.json").read_text())
        measured = {(r["workload"], r["dtype"]) for r in results}
        results += [r for r in before["results"] if (r["workload"], r["dtype"]) not in measured]
        limits = {name: max(value, before["limits"][name]) for name, value in limits.items()}
        commands = [c for c in before["commands"] if c not in commands] + commands
        versions, missing = before["versions"] | versions, before["missing"] | missing
    results.sort(key=lambda r: (WORKLOADS.index(r["workload"]), list(TOLERANCES).index(r["dtype"])))
    report = {
        "machine": options.machine,
        "cpu": cpu_name(),
        "date": datetime.date.today().isoformat(),
        "threads": options.threads,
        "level": level,
        "rounds": options.rounds,
        "commands": commands,
        "remark": options.remark,
        "versions": versions,
        "limits": limits,
        "missing": missing,
        "results": results,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{stem}.md").write_text(table(report))
    print(f"{stem}.md")


if __name__ == "__main__":
    main()
