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
    "H100 80GB HBM3": (989.5e12, 66.9e12, 3.35e12),
    "A100": (312e12, 19.5e12, 2.039e12),
}


def roof(name):
    return next((value for key, value in ROOFS.items() if key in name), None)


def share_and_rate(result, peaks):
    """Share of the roof, and FLOP/s or bytes/s, whichever bounds."""
    seconds = result["median_us"] / 1e6
    if not peaks or not result["flops"] + result["bytes"]:
        return "–", "–"
    arithmetic = result["flops"] / (peaks[1] if result["dtype"] == "f32" else peaks[0])
    memory = result["bytes"] / peaks[2]
    rate = f"{result['flops'] / seconds / 1e12:.0f} TFLOP/s" if arithmetic > memory else f"{result['bytes'] / seconds / 1e12:.2f} TB/s"
    return f"{100 * max(arithmetic, memory) / seconds:.0f} %", rate


def conditions(rows):
    """Clocks and power over all turns, where they were sampled."""
    clocks = [row["clock_mhz"] for row in rows if row.get("clock_mhz")]
    power = [row["power_w"] for row in rows if row.get("power_w")]
    if not clocks or not power:
        return "Clocks and power were not sampled."
    lowest, highest = min(low for low, _, _ in clocks), max(high for _, _, high in clocks)
    return f"While programs ran: SM clock {lowest} to {highest} MHz, power up to {max(most for _, most in power):.0f} W."


def listed(title, reports, key):
    what = {what: why for report in reports for what, why in report.get(key, {}).items()}
    return ["", f"{title}:", "", *(f"* {name}: {why}" for name, why in what.items())] if what else []


def table(reports):
    newest, rows = reports[-1], {}
    for report in reports:
        for result in report["results"]:
            rows[result["case"], result["variant"]] = result
    device, state, versions = newest["device"], newest["state"], newest["versions"]
    peaks = roof(device["name"])
    lines = [
        f"# {device['name']}, {newest['date']}",
        "",
        f"Driver {state.get('driver_version', 'not told')}, largest SM clock {state.get('clocks.max.sm', '?')} MHz, power limit "
        f"{state.get('power.limit', '?')} W; torch {versions.get('torch')}, CUDA {versions.get('CUDA')}; commit {newest['commit'] or 'not told'}.",
        conditions(list(rows.values())),
        *(f"Command: `{command}`" for report in reports for command in report["commands"]),
        "",
        "Time: median over the rounds of each round's median call, cold L2 cache. Ratio: time of the peer over time of gatefold in the same",
        "round, median (least to greatest); below 1 the peer is faster. Of roof: gatefold's share of the larger of the two times that the",
        "device's published peaks (arithmetic, memory) allow.",
        "",
        "| case | gatefold | rate | of roof | peer | its time | ratio | error |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for case in dict.fromkeys(case for case, _ in rows):
        ours = rows[case, "gatefold"]
        share, rate = share_and_rate(ours, peaks)
        left = f"| {case} | {ours['median_us']:.1f} us | {rate} | {share} "
        others = [row for (of, variant), row in rows.items() if of == case and variant != "gatefold"]
        for row in others:
            ratio = f"**{row['ratio']:.2f}**" if row["ratio"] < 1 else f"{row['ratio']:.2f}"
            spread = f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
            error = f"{row['error']:.0e}" + (f"; {row['note']}" if row["note"] else "")
            lines.append(left + f"| {row['variant']} | {row['median_us']:.1f} us | {ratio} {spread} | {error} |")
        if not others:
            lines.append(left + "| none | – | – | – |")
    lines += listed("Answers that differ, so not timed", reports, "wrong")
    lines += listed("Not measured", reports, "missing")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.splitlines()[0])
    sys.stdout.write(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
