"""Checks models and ops against tensors computed by the authors' code.

    python -m zoo.tools.check_parity goldens                     # every family
    python -m zoo.tools.check_parity goldens --family vim --device cuda --dtype bfloat16
    python -m zoo.tools.check_parity --keys keys                 # names and sizes of released checkpoints

Prints one row per case and, last, ``N passed, N failed``; exits with 1 if any case failed.
"""

import argparse
import itertools
import sys

import torch

from zoo.parity import check_all_keys, check_cases

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Runs the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder of families of cases, or of one family's cases")
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--device", default="cpu", help="device to run on (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and inputs (default: float32)")
    parser.add_argument("--keys", metavar="FOLDER", help="folder of key lists of released checkpoints")
    args = parser.parse_args(argv)
    if args.folder is None and args.keys is None:
        parser.error("give a folder of cases, --keys FOLDER, or both")

    checks = []
    if args.folder is not None:
        checks.append(check_cases(args.folder, args.family, args.device, DTYPES[args.dtype]))
    if args.keys is not None:
        checks.append(check_all_keys(args.keys, args.family))
    passed = failed = 0
    try:
        for report in itertools.chain(*checks):
            print(report, flush=True)
            passed += report.passed
            failed += not report.passed
    except FileNotFoundError as error:
        parser.error(str(error))
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
