"""Where does the time of a training step go?

    python experiments/step_time/profile_step.py ["NAME" ...]

Traces some steps of each network with JAX's profiler on the CPU and adds up, over all threads, the
time of each kind of operation of the compiled program, in per cent. Prints a row for each network.
"""

import argparse
import glob
import gzip
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))

from networks import NETWORKS
from worker import jax_step

# The dearest operation in a fusion says what it is, in this order.
KINDS = {
    "convolution": {"convolution"},
    "matmul": {"dot", "custom-call"},
    "pooling": {"reduce-window", "select-and-scatter"},
    "reduction": {"reduce"},
    "elementwise": {
        "add",
        "multiply",
        "subtract",
        "divide",
        "maximum",
        "select",
        "exponential",
        "rsqrt",
        "tanh",
        "erf",
        "log",
        "compare",
        "power",
        "negate",
        "convert",
        "clamp",
        "minimum",
    },
    "layout": {
        "transpose",
        "copy",
        "concatenate",
        "pad",
        "slice",
        "dynamic-slice",
        "broadcast",
        "reverse",
        "iota",
        "bitcast",
        "dynamic-update-slice",
        "gather",
        "reshape",
    },
}
STEPS = 5


def times(step) -> Counter:
    """Microseconds of each operation, by its name without number."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                step()
        (trace,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        events = json.loads(gzip.open(trace).read())["traceEvents"]
    total = Counter()
    for event in events:
        if "hlo_op" in event.get("args", {}):
            total[event["args"]["hlo_op"]] += event["dur"]
    return total


def kinds_of(program: str) -> dict[str, str]:
    """One of KINDS for each operation of a compiled program, by its name."""
    bodies, inside, lines = {}, None, []
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = bodies.setdefault(head[1], set())
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            inside.add(found[2])
            calls = re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", line)
            lines.append((found[1], found[2], calls))
    for _ in range(3):  # a call in a call in a call
        for name, operation, calls in lines:
            for call in calls if operation in ("fusion", "call", "while") else ():
                bodies.setdefault(name, {operation}).update(bodies.get(call, ()))
    return {
        name: next(
            (kind for kind, words in KINDS.items() if words & bodies.get(name, {operation})),
            "other",
        )
        for name, operation, _ in lines
    }


def main(names: list[str]) -> None:
    """Prints the table."""
    print("| network | " + " | ".join([*KINDS, "other"]) + " | dearest operations |")
    print("|---|" + "---|" * (len(KINDS) + 2))
    for name in names:
        step = jax_step(NETWORKS[name], train=True)
        for _ in range(2):
            step()
        operations, known = times(step), kinds_of(step.program)
        kinds, everything = Counter(), sum(operations.values())
        for operation, duration in operations.items():
            kinds[known.get(operation, "other")] += duration
        cells = [f"{100 * kinds[kind] / everything:.0f}" for kind in [*KINDS, "other"]]
        dearest = ", ".join(
            f"{operation} ({known.get(operation)}) {100 * duration / everything:.0f}"
            for operation, duration in operations.most_common(4)
        )
        print(f"| {name} | {' | '.join(cells)} | {dearest} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=["all", *NETWORKS], default="all")
    names = parser.parse_args().names
    main(list(NETWORKS) if "all" in names else names)
