#!/usr/bin/env python3
"""Times gatefold and other libraries on one GPU, on the same inputs, and writes times and ratios as JSON.

    python benches/compare/gpu/run.py --bench PATH --machine h200 [--only prefill,moe] [--rounds 5] [--minutes 9] [--results DIR]

PATH is the bench `cuda` as `cargo bench --bench cuda --no-run` builds it; the machine that runs this needs no Rust. For each case
gatefold makes the inputs, checks its answers against its reference and writes both as files; every peer computes the same, and its
answers are compared with gatefold's: where they differ the case is not timed, and the run ends with an error. Then come rounds, in an
order that rotates. A call is timed on the GPU, between two events, after a kernel that fills the L2 cache with something else; a ratio
is formed in each round.

A rented machine may be lost at any time: the report is written after every case, and the same command goes on where the last one
ended. A program that ends or does not answer costs its case, not the run.
"""

import argparse
import datetime
import faulthandler
import json
import os
import select
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE.parent / "cpu"))

import numpy as np
from peer import Arrays
from run import near_ties, read, row_errors

# Largest error of a row over its length, peer against gatefold: the peers round between steps.
TOLERANCES = {"f32": 1e-3, "bf16": 3e-2, "f16": 4e-3}
FLUSH_BYTES = 256 << 20  # five times the L2 cache of an H200


class Failed(Exception):
    """Why there is no time: an answer that differs, an error, a program that is lost."""


# ------------------------------------------------------------------------------ gatefold


class Bench:
    """gatefold's bench, which takes commands; started anew after each trouble, because an error of CUDA stays with a process."""

    def __init__(self, path, seconds):
        self.path, self.seconds, self.process, self.buffer = path, seconds, None, b""

    def ask(self, *fields):
        if self.process is None:
            self.buffer = b""
            self.process = subprocess.Popen([self.path, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            return self.answer(" ".join(map(str, fields)), "\t".join(map(str, fields)) + "\n")
        except Failed:
            self.close()
            raise

    def answer(self, what, line):
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"gatefold has ended before: {what}") from None
        out, end = self.process.stdout.fileno(), time.monotonic() + self.seconds
        while b"\n" not in self.buffer:
            if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Failed(f"gatefold did not answer in {self.seconds:.0f} s: {what}")
            part = os.read(out, 1 << 16)
            if not part:
                raise Failed(f"gatefold ended at: {what}")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\n")
        try:
            answer = json.loads(text)
        except ValueError:
            raise Failed(f"gatefold: {text.decode(errors='replace')}") from None
        if "error" in answer:
            raise Failed(f"gatefold: {answer['error']}")
        return answer

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            try:
                self.process.stdin.close()
            except BrokenPipeError:  # a command was left in it
                pass
            self.process = None


# ------------------------------------------------------------------------------ the peers


class Torch:
    """The peers, and seconds of their calls on the GPU."""

    def __init__(self):
        import torch
        from peers import KINDS

        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.torch, self.kinds = torch, KINDS
        self.other = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.versions = {"torch": torch.__version__, "CUDA": torch.version.cuda}

    def make(self, kind, folder):
        return self.kinds[kind](Arrays(folder)) if kind != "alone" else {}

    def numbers(self, answers):
        return {name: answers[name].float().cpu().numpy() for name in ("out", "ids") if name in answers}

    def seconds(self, call, calls):
        event = lambda: self.torch.cuda.Event(enable_timing=True)
        events = [(event(), event()) for _ in range(calls)]
        for start, end in events:
            self.other.zero_()  # also keeps the GPU busy while the host queues the call
            start.record()
            call()
            end.record()
        self.torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def is_alive(self):
        """An error of CUDA stays with the process that has met it."""
        try:
            self.torch.cuda.synchronize()
            return True
        except Exception:
            return False

    def free(self):
        self.torch.cuda.empty_cache()


def compare(folder, kind, dtype, got):
    """The largest error of a peer's answer, and a note."""
    truth = read(folder, "out")
    if got["out"].size != truth.size:
        raise Failed(f"{got['out'].size} numbers, gatefold has {truth.size}")
    errors, note = row_errors(got["out"], truth), ""
    if kind == "routing":
        logits, ids = read(folder, "logits"), read(folder, "ids")
        theirs = got["ids"].astype(np.int64)
        if not np.array_equal(np.take_along_axis(logits, theirs, 1), np.take_along_axis(logits, ids, 1)):
            raise Failed("other experts than gatefold's")
    bad = errors > TOLERANCES[dtype]
    if kind == "moe" and bad.any():
        excused = bad & near_ties(folder, dtype)
        note = f"{excused.sum()} of {bad.size} tokens with other experts (tied logits)"
        errors, bad = errors[~excused], bad[~excused]
    if bad.any():
        raise Failed(f"{bad.sum()} of {bad.size} rows differ, the worst by {errors.max():.1e}, allowed are {TOLERANCES[dtype]:.0e}")
    return float(errors.max(initial=0.0)), note


# ------------------------------------------------------------------------------ clocks and power

FIELDS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def gpu_state():
    """Clocks, power and temperature now, as nvidia-smi tells them."""
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return dict(zip(FIELDS.split(","), text.splitlines()[0].split(", ")))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return {"trouble": f"{type(error).__name__}: {error}"}


class Sampler:
    """SM clock (MHz) and power (W) every 10 ms while a program has its turn, by NVML where it is there."""

    def __init__(self):
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.device = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
            self.sample()
        except Exception:
            self.nvml = None

    def sample(self):
        clock = self.nvml.nvmlDeviceGetClockInfo(self.device, self.nvml.NVML_CLOCK_SM)
        return clock, self.nvml.nvmlDeviceGetPowerUsage(self.device) / 1e3

    def during(self, work):
        """What `work` gives, and the samples meanwhile."""
        if self.nvml is None:
            return work(), []
        samples, done = [], threading.Event()

        def watch():
            while not done.wait(0.01):
                try:
                    samples.append(self.sample())
                except Exception:
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return work(), samples
        finally:
            done.set()
            watcher.join()


# ------------------------------------------------------------------------------ a case


def measure(bench, peers, sampler, case, options):
    """Rows of a case, what could not run, and answers that differ."""
    folder = Path(tempfile.mkdtemp(prefix="gatefold-", dir=options.scratch))
    try:
        return measure_in(folder, bench, peers, sampler, case, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        peers.free()


def measure_in(folder, bench, peers, sampler, case, options):
    about = bench.ask("prepare", case, folder)
    kind, dtype = about["kind"], about["dtype"]
    rows = [{"variant": "gatefold", "run": lambda calls: bench.ask("run", calls)["seconds"], "error": 0.0, "note": ""}]
    missing, wrong = {}, {}
    for name, start in peers.make(kind, folder).items():
        try:
            call = start()
            got = peers.numbers(call())
        except Exception as error:  # a peer may lack the type or the operation: told, not hidden
            missing[f"{case} {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        try:
            error, note = compare(folder, kind, dtype, got)
        except Failed as problem:
            wrong[f"{case} {name}"] = str(problem)
            continue
        rows.append({"variant": name, "run": lambda calls, call=call: peers.seconds(call, calls), "error": error, "note": note})
    if wrong:
        return [], missing, wrong  # nobody knows who is right: no times
    for row in rows:
        row["run"](2)
        first = min(row["run"](3))
        row |= {"calls": max(3, min(50, round(options.seconds / (first + 1e-4)))), "medians": [], "fastest": [], "samples": []}
    for number in range(options.rounds):
        turn = number % len(rows)
        for row in rows[turn:] + rows[:turn]:
            seconds, samples = sampler.during(lambda row=row: row["run"](row["calls"]))
            row["medians"].append(statistics.median(seconds))
            row["fastest"].append(min(seconds))
            row["samples"] += samples
    state = gpu_state()
    results = []
    for row in rows:
        ratios = [theirs / own for theirs, own in zip(row["medians"], rows[0]["medians"])]
        clocks, power = [clock for clock, _ in row["samples"]], [power for _, power in row["samples"]]
        results.append(
            {
                "case": case,
                "kind": kind,
                "dtype": dtype,
                "variant": row["variant"],
                "median_us": 1e6 * statistics.median(row["medians"]),
                "medians_us": [1e6 * seconds for seconds in row["medians"]],
                "fastest_us": 1e6 * min(row["fastest"]),
                "ratios": ratios,
                "ratio": statistics.median(ratios),
                "error": row["error"],
                "note": row["note"],
                "flops": about["flops"],
                "bytes": about["bytes"],
                "clock_mhz": [min(clocks), statistics.median(clocks), max(clocks)] if clocks else None,
                "power_w": [statistics.median(power), max(power)] if power else None,
                "state": state,
            }
        )
        last = results[-1]
        print(f"{case:40} {last['variant']:30} {last['median_us']:10.1f} us  x {last['ratio']:.2f}  {last['note']}", flush=True)
    return results, missing, wrong


# ------------------------------------------------------------------------------ the run


def new_report(options):
    return {
        "machine": options.machine,
        "date": datetime.date.today().isoformat(),
        "commit": options.commit,
        "commands": [],
        "rounds": options.rounds,
        "missing": {},
        "wrong": {},
        "done": [],
        "results": [],
    }


def save(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def run(options, bench, peers, sampler):
    """The exit status: 0, or 1 where an answer differed or a case failed."""
    path = options.results / f"{options.machine}-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() else new_report(options)
    if report.get("started"):
        report["missing"][report["started"]] = "the run ended in this case"
        report["done"].append(report.pop("started"))
    report["commands"].append(shlex.join(["python", "benches/compare/gpu/run.py", *sys.argv[1:]]))
    report |= {"device": bench.ask("device"), "versions": peers.versions, "state": gpu_state()}
    wanted = [name for name in options.only.split(",") if name]
    cases = [case for case in bench.ask("list")["cases"] if not wanted or any(name in case for name in wanted)]
    left = [case for case in cases if case not in report["done"]]
    save(report, path)
    status, end = 0, time.monotonic() + 60 * options.minutes
    for number, case in enumerate(left):
        if time.monotonic() > end:
            print(f"{options.minutes:g} minutes are over, {len(left) - number} cases are left: give the same command again")
            break
        report["started"] = case
        save(report, path)
        faulthandler.dump_traceback_later(3 * options.patience, exit=True)  # a call that never ends
        try:
            results, missing, wrong = measure(bench, peers, sampler, case, options)
        except Exception as problem:
            bench.close()
            results, missing, wrong = [], {case: f"{type(problem).__name__}: {str(problem)[:300]}"}, {}
            status = 1
        faulthandler.cancel_dump_traceback_later()
        for what, why in (missing | wrong).items():
            print(f"{what}: {why}", flush=True)
        status = 1 if wrong else status
        report["results"] += results
        report["missing"] |= missing
        report["wrong"] |= wrong
        report["done"].append(report.pop("started"))
        save(report, path)
        if not peers.is_alive():
            print("an error of CUDA: starting anew", flush=True)
            bench.close()
            left_minutes = max(0.0, (end - time.monotonic()) / 60)
            os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(left_minutes)])
    bench.close()
    print(path)
    return 1 if report["wrong"] else status


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True, help="the built bench `cuda`")
    parser.add_argument("--machine", required=True, help="short name of the GPU, for the file's name")
    parser.add_argument("--commit", default="", help="what was built, for the report")
    parser.add_argument("--only", default="", help="cases whose name contains one of these, as prefill,moe/qwen3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of calls of each program in each round")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no case after so many")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which an answer of gatefold is given up, and a case after three times as many")
    parser.add_argument("--scratch", default="/dev/shm", help="folder for inputs: some GB")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    options = parser.parse_args()
    bench = Bench(options.bench, options.patience)
    try:
        bench.ask("device")  # before the peers are loaded
    except Failed as problem:
        sys.exit(str(problem))
    sys.exit(run(options, bench, Torch(), Sampler()))


if __name__ == "__main__":
    main()
