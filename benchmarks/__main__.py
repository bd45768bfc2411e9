"""Measure what a training step costs, by method: tables to data/results/bench, figures to figures/bench."""

import argparse
import sys
import time

import pandas as pd
import torch

from apexlib.provenance import save_table
from apexlib.suite.folders import folders
from benchmarks import effective_rank
from benchmarks.cases import scaling_studies, step_studies
from benchmarks.figures import draw
from benchmarks.studies import forecasts, overheads, scaling, steps
from benchmarks.targets import targets


def main(arguments: list[str] | None = None) -> int:
    """Run all studies; a size that ends within two minutes with `--quick`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, no more")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--name", default=None, help="profile to write to (bench, bench-quick, bench-cuda)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a case may ask for more
    suffix = "-quick" if options.quick else "" if options.device == "cpu" else f"-{options.device}"
    paths = folders(options.name or f"bench{suffix}")
    started = time.perf_counter()
    tables: dict[str, pd.DataFrame] = {}

    def keep(name: str, table: pd.DataFrame) -> pd.DataFrame:
        facts = {"quick": options.quick, "seconds": round(time.perf_counter() - started)}
        print(save_table(table, name, paths.results, **facts), flush=True)
        return tables.setdefault(name, table)

    studies = step_studies(options.device, options.quick)
    measured = keep("steps", steps(studies))
    model = next(study.case for study in studies if study.case.kind == "model")
    extra = keep("overheads", overheads(model, 3 if options.quick else 9))
    keep("scaling", scaling(scaling_studies(options.device, options.quick)))
    if options.device == "cpu":
        keep("targets", targets(measured, extra, keep("forecast", forecasts(studies, measured))))
    draw(tables, paths.figures)
    small = ["--rows", "256", "--columns", "704"] if options.quick else []
    effective_rank.main([*small, "--out", str(paths.results)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
