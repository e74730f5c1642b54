"""What the Python peers share: the commands that `run.py` sends, and the arrays that it hands over.

A peer reads commands, fields separated by tabs, and answers each with a line of JSON:

    prepare  WORKLOAD  DTYPE  FOLDER    makes every variant, calls it once with each input, writes the answers
                                        to NAME.VARIANT.bin as f32: {"variants": [...], "failed": {variant: why}}
    run  VARIANT  CALLS                 {"seconds": [...]}
    versions                            {library: version}

`arrays.json` in the folder gives file, type, shape, strides and start of each array, in elements. bf16 arrives as its bits.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

BITS = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16, "i32": np.int32}


class Arrays:
    """The arrays of a folder, by name."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.table = json.loads((self.folder / "arrays.json").read_text())

    def __contains__(self, name):
        return name in self.table

    def shape(self, name):
        return self.table[name]["shape"]

    def __getitem__(self, name):
        """A view of the mapped file, with its strides."""
        entry = self.table[name]
        data = np.memmap(self.folder / entry["file"], BITS[entry["dtype"]], mode="r")[entry["start"] :]
        strides = [stride * data.itemsize for stride in entry["strides"]]
        return np.lib.stride_tricks.as_strided(data, entry["shape"], strides, writeable=False)


@dataclass
class Variant:
    """A way to do the work: `call(input)` is timed, `finish` makes {name: f32 array} of its answer."""

    call: Callable
    finish: Callable
    inputs: int = 1
    next: int = 0


def first_answers(name, variant, folder):
    parts = {}
    for number in range(variant.inputs):
        for key, answer in variant.finish(variant.call(number)).items():
            parts.setdefault(key, []).append(np.ascontiguousarray(answer, dtype=np.float32).ravel())
    for key, answers in parts.items():
        np.concatenate(answers).tofile(Path(folder) / f"{key}.{name}.bin")


def run(variant, calls):
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        answer = variant.call(variant.next)
        seconds.append(time.perf_counter() - start)
        del answer
        variant.next = (variant.next + 1) % variant.inputs
    return seconds


def serve(make, versions):
    """`make(workload, dtype, arrays)` gives {name: function that makes a Variant}."""
    # Libraries print, too: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    made = {}
    for line in sys.stdin:
        match line.rstrip("\n").split("\t"):
            case ["prepare", workload, dtype, folder]:
                made.clear()  # their memory, before the next ones'
                failed = {}
                for name, start in make(workload, dtype, Arrays(folder)).items():
                    try:
                        variant = start()
                        first_answers(name, variant, folder)
                        made[name] = variant
                    except Exception as error:  # a peer may lack the type or the operation: told, not hidden
                        failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                answer = {"variants": list(made), "failed": failed}
            case ["run", name, calls]:
                answer = {"seconds": run(made[name], int(calls))}
            case ["versions"]:
                answer = versions
            case _:
                answer = {"error": f"unknown command: {line.strip()}"}
        print(json.dumps(answer), file=answers, flush=True)
