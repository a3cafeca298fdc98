"""Draw benchmarks/plot.png from the JSON lines in benchmarks/results.jsonl: times as ratios to the dense model's.

    python benchmarks/plot.py

A panel for each machine and kind: the sums of `linear.py`'s linears, and `step.py`'s largest size at batch 1, of the
last line of each that has a dense model in it to compare with.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
LONGEST = 20.0  # ratio that is drawn


def panels(lines: list[dict]) -> dict[str, dict[str, float]]:
    """Title -> way -> ratio; later lines replace earlier ones of the same title."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        where = f"{line['machine']['device']}, {line['machine']['date']}"
        if line["bench"] == "linear":
            first = line["linears"][0]
            what = "the linears of a block" if len(line["linears"]) > len(line["totals"]) else "a linear of 3840 x 3840"
            title = f"{what}, {first['rows']} rows\n{where}"
            found[title] = {row["what"]: row["ratio"] for row in line["totals"] if not row["what"].startswith(" ")}
        elif line["bench"] == "step":
            rows = [row for row in line["steps"] if row["batch"] == 1 and row.get("vs_dense")]
            for row in rows:
                if row["size"] == max(other["size"] for other in rows):
                    title = f"one step at {row['size']} x {row['size']}, {line['weights']}\n{where}"
                    found.setdefault(title, {})[row["what"]] = row["vs_dense"]
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    found = panels(lines)
    figure, axes = pyplot.subplots(len(found), 1, figsize=(8, 2.6 * len(found)), squeeze=False)
    for axis, (title, ratios) in zip(axes[:, 0], found.items()):
        names = [name for name, ratio in ratios.items() if ratio <= LONGEST][::-1]
        beyond = [f"{name} {ratio:.0f}" for name, ratio in ratios.items() if ratio > LONGEST]
        bars = axis.barh(names, [ratios[name] for name in names], color="#4c72b0")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title + (f" (beyond the axis: {', '.join(beyond)})" if beyond else ""), fontsize=9)
        axis.set_xlabel("time, ratio to dense 16 bit (lower is better)")
        axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(HERE / "plot.png", dpi=100)


if __name__ == "__main__":
    main()
