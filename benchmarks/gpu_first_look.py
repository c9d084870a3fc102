"""Measure in the first minutes on a GPU: the device's ceilings, parity with the CPU, each training mode, step times.

Only torch, safetensors, numpy and einops are needed; all weights are random. Each result is appended to a file of JSON
lines as it comes: a run that is cut short keeps what it has, and another run with the same file measures what is
missing. At the end all results of the file are printed as Markdown tables.

    python benchmarks/gpu_first_look.py [--minutes 10] [--device cuda] [--small] [--out FILE]
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for folder in ("benchmarks", "tests"):  # a package of this name among those installed would hide ours
    sys.modules.setdefault(folder, ModuleType(folder)).__path__ = [str(ROOT / folder)]


def main() -> int:
    """Measure and print tables; return the exit code: 1 if a result is wrong or failed, 2 if none can be measured."""
    from benchmarks.first_look.records import Records, Refused
    from benchmarks.first_look.rows import Options
    from benchmarks.first_look.supervision import supervise
    from benchmarks.first_look.tables import tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time budget; rows that do not fit are skipped")
    parser.add_argument("--device", default="cuda", help="device to measure")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself on a CPU")
    parser.add_argument("--blocks", type=int, help="number of 14B blocks; default: as many as fit, at most 40")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PREFIX", help="rows whose name begins with one of these"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_first_look.jsonl", help="file of JSON lines")
    given = parser.parse_args()
    records = Records(given.out)
    options = Options(given.device, small=given.small, blocks=given.blocks, only=tuple(given.only))
    try:
        supervise(options, records, seconds=60 * given.minutes)
    except Refused as problem:
        print(f"ERROR: {problem}", file=sys.stderr)
        return 2
    latest = records.latest()
    print(tables(latest))
    return int(any(row["status"] in ("wrong", "failed") for row in latest.values()))


if __name__ == "__main__":
    sys.exit(main())
