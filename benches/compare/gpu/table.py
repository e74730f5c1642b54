#!/usr/bin/env python3
"""Joins what `run.py` wrote into one table: python benches/compare/gpu/table.py RESULT.json [MORE.json ...] > RESULT.md

Cases of several files stand together; of one case and variant in several files, the last counts. The roofs are the device's published
peaks, dense: what a kernel reaches of them is its share.
"""

import json
import sys
from pathlib import Path

# Dense peaks: bf16 or f16 tensor FLOP/s, f32 FLOP/s outside of the tensor cores, bytes/s. NVIDIA's data sheets.
ROOFS = {
    "H200": (989.5e12, 66.9e12, 4.8e12),
    "H100 SXM": (989.5e12, 66.9e12, 3.35e12),
    "A100": (312e12, 19.5e12, 2.039e12),
}


def roof(name):
    for key, value in ROOFS.items():
        if all(part in name for part in key.split()):
            return value
    return None


def table(reports):
    newest, rows = reports[-1], {}
    for report in reports:
        for result in report["results"]:
            rows[result["case"], result["variant"]] = result
    peaks = roof(newest["device"]["name"])
    lines = [
        f"# {newest['device']['name']}, {newest['date']}",
        "",
        f"Driver {newest['state']['driver_version']}, SM clock {newest['state']['clocks.sm']} of {newest['state']['clocks.max.sm']} MHz, "
        f"power limit {newest['state']['power.limit']} W; torch {newest['versions']['torch']}, CUDA {newest['versions']['CUDA']}; "
        f"commit {newest['commit'] or 'not told'}.",
        *(f"Command: `{report['command']}`" for report in reports),
        "",
        "Time: median over the rounds of each round's median call, cold L2 cache. Ratio: time of the peer over time of gatefold in the same",
        "round, median (least to greatest); below 1 the peer is faster. Of roof: gatefold's share of the larger of the two times that the",
        "device's published peaks (arithmetic, memory) allow.",
        "",
        "| case | gatefold | rate | of roof | peer | its time | ratio | error |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    cases = list(dict.fromkeys(case for case, _ in rows))
    for case in cases:
        ours = rows[case, "gatefold"]
        seconds = ours["median_us"] / 1e6
        share, rate = "–", "–"
        if peaks and ours["flops"] + ours["bytes"]:
            arithmetic = ours["flops"] / (peaks[1] if ours["dtype"] == "f32" else peaks[0])
            memory = ours["bytes"] / peaks[2]
            share = f"{100 * max(arithmetic, memory) / seconds:.0f} %"
            rate = f"{ours['flops'] / seconds / 1e12:.0f} TFLOP/s" if arithmetic > memory else f"{ours['bytes'] / seconds / 1e12:.2f} TB/s"
        left = f"| {case} | {ours['median_us']:.1f} us | {rate} | {share} "
        others = [row for (of, variant), row in rows.items() if of == case and variant != "gatefold"]
        for row in others:
            ratio = f"**{row['ratio']:.2f}**" if row["ratio"] < 1 else f"{row['ratio']:.2f}"
            spread = f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
            error = f"{row['error']:.0e}" + (f"; {row['note']}" if row["note"] else "")
            lines.append(left + f"| {row['variant']} | {row['median_us']:.1f} us | {ratio} {spread} | {error} |")
        if not others:
            lines.append(left + "| none | – | – | – |")
    missing = {what: why for report in reports for what, why in report["missing"].items()}
    if missing:
        lines += ["", "Not measured:", "", *(f"* {what}: {why}" for what, why in missing.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.splitlines()[0])
    sys.stdout.write(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
