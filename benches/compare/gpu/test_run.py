#!/usr/bin/env python3
"""`run.py` and `table.py` without a GPU: a bench that is a script, peers that are functions.

    python benches/compare/gpu/test_run.py        needs NumPy
"""

import argparse
import importlib.util
import json
import stat
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Answers as the bench does; `ends` ends, `hangs` says nothing, `fails` gives an error, all in `prepare`; `late` ends in `run`.
BENCH = """#!{python}
import json, sys, time
from pathlib import Path
import numpy as np

def prepare(case, folder):
    if "ends" in case:
        sys.exit(1)
    if "hangs" in case:
        time.sleep(60)
    if "fails" in case:
        return {{"error": "an illegal memory access"}}
    kind = case.split("/")[0]
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    table = {{}}
    for name, data in [("x", x), ("out", 2 * x)]:
        data.tofile(Path(folder) / (name + ".bin"))
        table[name] = {{"file": name + ".bin", "dtype": "f32", "shape": [3, 4], "strides": [4, 1], "start": 0}}
    (Path(folder) / "arrays.json").write_text(json.dumps(table))
    return {{"kind": kind, "dtype": "f32", "flops": 1e9, "bytes": 1e6}}

case = ""
for line in sys.stdin:
    match line.rstrip("\\n").split("\\t"):
        case ["device"]:
            answer = {{"name": "NVIDIA H200", "cuda": [12, 8]}}
        case ["list"]:
            answer = {{"cases": {cases}}}
        case ["prepare", name, folder]:
            made = name
            answer = prepare(name, folder)
        case ["run", calls]:
            if "late" in made:
                sys.exit(1)
            answer = {{"seconds": [2e-6] * int(calls)}}
    print(json.dumps(answer), flush=True)
"""


def load(name):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, table = load("run"), load("table")


class Peers:
    """Twice the input, right and wrong, and one that is not there."""

    versions = {"torch": "none", "CUDA": "none"}

    def make(self, kind, folder):
        x = run.read(folder, "x") if kind != "alone" else None
        right = lambda: lambda: {"out": 2 * x}
        wrong = lambda: lambda: {"out": 3 * x}

        def absent():
            raise RuntimeError("no such operation")

        return {"alone": {}, "linear": {"right": right, "absent": absent}, "prefill": {"right": right, "wrong": wrong}}[kind]

    def numbers(self, answers):
        return answers

    def seconds(self, call, calls):
        call()
        return [3e-6] * calls

    def is_alive(self):
        return True

    def free(self):
        pass


class Test(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)

    def tearDown(self):
        self.folder.cleanup()

    def run_with(self, cases, minutes=1.0):
        bench = self.path / "bench"
        bench.write_text(BENCH.format(python=sys.executable, cases=json.dumps(cases)))
        bench.chmod(bench.stat().st_mode | stat.S_IXUSR)
        options = argparse.Namespace(
            machine="fake", commit="abc", only="", rounds=3, seconds=1e-4, minutes=minutes, patience=3.0, scratch=self.path, results=self.path
        )
        status = run.run(options, run.Bench(str(bench), options.patience), Peers(), run.Sampler())
        return status, json.loads(next(self.path.glob("fake-*.json")).read_text())

    def test_times_and_table(self):
        status, report = self.run_with(["linear/a", "alone/b"])
        self.assertEqual(status, 0)
        variants = [(result["case"], result["variant"], result["ratio"]) for result in report["results"]]
        self.assertEqual(variants[0], ("linear/a", "gatefold", 1.0))
        self.assertEqual(variants[1][:2], ("linear/a", "right"))
        self.assertAlmostEqual(variants[1][2], 1.5)
        self.assertEqual(variants[2:], [("alone/b", "gatefold", 1.0)])
        self.assertIn("no such operation", report["missing"]["linear/a absent"])
        text = table.table([report])
        self.assertIn("| linear/a | 2.0 us | 500 TFLOP/s |", text)
        self.assertIn("| right | 3.0 us | 1.50 (1.50 to 1.50) | 0e+00 |", text)
        self.assertIn("* linear/a absent: RuntimeError: no such operation", text)

    def test_a_peer_that_differs_is_not_timed(self):
        status, report = self.run_with(["prefill/a", "linear/b"])
        self.assertEqual(status, 1)
        self.assertEqual({result["case"] for result in report["results"]}, {"linear/b"})
        self.assertIn("rows differ", report["wrong"]["prefill/a wrong"])
        self.assertIn("Answers that differ", table.table([report]))

    def test_a_lost_bench_costs_its_case(self):
        cases = ["linear/ends", "linear/a", "linear/hangs", "linear/b", "linear/fails", "linear/c", "linear/late", "linear/d"]
        status, report = self.run_with(cases)
        self.assertEqual(status, 1)
        self.assertEqual({result["case"] for result in report["results"]}, {"linear/a", "linear/b", "linear/c", "linear/d"})
        for case, why in [("ends", "ended"), ("hangs", "did not answer"), ("fails", "illegal memory"), ("late", "ended")]:
            self.assertIn(why, report["missing"][f"linear/{case}"])
        self.assertEqual(list(self.path.glob("gatefold-*")), [])

    def test_goes_on_where_it_ended(self):
        _, report = self.run_with(["linear/a", "linear/b"], minutes=-1.0)
        self.assertEqual(report["done"], [])
        _, report = self.run_with(["linear/a"])
        report["started"] = "linear/b"
        next(self.path.glob("fake-*.json")).write_text(json.dumps(report))
        _, report = self.run_with(["linear/a", "linear/b", "linear/c"])
        self.assertEqual([result["case"] for result in report["results"] if result["variant"] == "gatefold"], ["linear/a", "linear/c"])
        self.assertEqual(report["missing"]["linear/b"], "the run ended in this case")


if __name__ == "__main__":
    unittest.main()
