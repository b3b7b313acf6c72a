"""Seconds until `vlarl` answers (help, field list, a refused config), beside a bare Python and importing torch and ray.

Usage: python -m benchmarks.cli_startup [--repeats 9]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from benchmarks._results import write_result

VLARL = [sys.executable, "-c", "import sys; from vlarl_ray.cli import main; sys.exit(main(sys.argv[1:]))"]
CASES = {
    "limit: python -c pass": ([sys.executable, "-c", "pass"], 0),
    "vlarl --help": ([*VLARL, "--help"], 0),
    "vlarl train --help": ([*VLARL, "train", "--help"], 0),
    "vlarl train --seed x (refused)": ([*VLARL, "train", "--seed", "x"], 2),
    "baseline: import torch, ray": ([sys.executable, "-c", "import torch, ray"], 0),
}


def seconds(command, code):
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)
    elapsed = time.perf_counter() - start
    if done.returncode != code:
        raise RuntimeError(f"{command} ended with {done.returncode}, expected {code}: {done.stderr.decode()}")
    return elapsed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    figures = {"repeats": repeats, "load_1min": round(os.getloadavg()[0], 2)}
    for name, (command, code) in CASES.items():
        seconds(command, code)  # compiles bytecode and fills the page cache
        runs = sorted(seconds(command, code) for _ in range(repeats))
        figures[name] = {
            "median_s": round(statistics.median(runs), 4),
            "min_s": round(runs[0], 4),
            "max_s": round(runs[-1], 4),
        }
        print(f"{name:34} {figures[name]['median_s']:.3f} s")
    print(write_result("cli_startup", figures))


if __name__ == "__main__":
    main()
