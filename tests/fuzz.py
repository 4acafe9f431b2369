"""`make fuzz`: each parser of `parsers.py` for a minute, guided by the code that its input reaches; a table at the end.

Arguments: seconds for each, then names of parsers, all by default. What reached new code is kept in `.fuzz/corpus`
for the next run; an input that breaks a promise stays in `.fuzz` with its traceback above the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import atheris

PLACE = Path(__file__).resolve().parent.parent / ".fuzz"
SECONDS, LONGEST, HANGING = 60, 8192, 20  # of a parser, bytes of an input, seconds for one input


def explore(name: str, seconds: int) -> None:
    """Feed one parser in this process; the library ends it."""
    with atheris.instrument_imports(include=["tokencore"]):
        from parsers import PARSERS
    parse, seeds = PARSERS[name]
    corpus = PLACE / "corpus" / name.replace(" ", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-timeout={HANGING}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={PLACE}/{corpus.name}-", str(corpus)], parse)
    atheris.Fuzz()


def table(names: list[str], seconds: int) -> int:
    """Feed each in a process of its own, as a finding ends it; the exit code."""
    rows, bad = [], 0
    for name in names:
        program = [sys.executable, __file__, "--one", name, str(seconds)]
        ran = subprocess.run(program, capture_output=True, text=True, check=False, errors="replace")
        runs = re.search(r"number_of_executed_units: (\d+)", ran.stderr)
        bad += ran.returncode != 0
        if ran.returncode:
            print(f"{name}:\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")
        result = "a promise is broken" if ran.returncode else "all as promised"
        rows.append(f"| {name} | {int(runs[1]) if runs else 0:,} | {result} |")
        print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(["", "| parser | inputs | result |", "|---|--:|---|", *rows]))
    return min(bad, 1)


if __name__ == "__main__":
    first, *others = sys.argv[1:] or [str(SECONDS)]
    if first == "--one":
        explore(others[0], int(others[1]))
    else:
        from parsers import PARSERS

        sys.exit(table(others or list(PARSERS), int(first)))
