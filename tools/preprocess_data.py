"""Tokenized media, captions, rows and texts into indexed datasets: `python tools/preprocess_data.py --config FILE`.

Writes OUTPUT_PREFIX_train and, with a valid_fraction, OUTPUT_PREFIX_valid, or those of one shard of the inputs, which
merge_datasets.py joins. The same inputs and options give the same bytes, whatever shards and workers there were.
Nothing appears under the final names before everything is complete. Samples that cannot be used are skipped, counted
and named; too many of them stop the program. Started again, it does nothing where inputs and options have not changed.

`--plan` prints, from measured rates, how many tasks, hours and terabytes a corpus takes (options: `--plan --help`).
"""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from megatron_ext.config import load, run_program
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.preprocess import Work, split_prefix
from megatron_ext.data.report import dataset_report
from megatron_ext.files import check_folder
from megatron_ext.observe.progress import progress
from megatron_ext.plan.preprocessing import PlanConfig, make_plan, plan_lines

PLAN = "--plan"


def preprocess(config: PreprocessConfig) -> None:
    """Write the datasets and print their report.

    Raises:
        InputError: unreadable or contradicting inputs, too many bad samples, or a dataset that would be empty.
    """
    work = Work.find(config)
    report = work.finished()
    if report is not None:
        print(f"{work.prefix} is finished and nothing has changed: reused")
    else:
        what = f"shard {work.shard[0]} of {work.shard[1]}" if work.is_shard else "preprocess"
        with progress(f"{what}, {len(work.units)} files", work.size, "bytes", Console()) as advance:
            report = work.do(advance)
    for split, documents in report.documents.items():
        prefix = split_prefix(work.prefix, split)
        if documents:
            print("\n".join(dataset_report(DocumentDataset(prefix, work.vocabulary))), flush=True)
        else:
            print(f"{prefix}: no documents")
    for line in report.lines():
        print(line)


def main(argv: list[str]) -> None:
    """Write the datasets that `argv` describes, or, with --plan, print the plan of a corpus."""
    if PLAN not in argv:
        config = load(PreprocessConfig, argv, prog="preprocess_data.py")
        check_folder(Path(config.output_prefix).parent, "output_prefix")
        preprocess(config)
        return
    config = load(PlanConfig, [word for word in argv if word != PLAN], prog=f"preprocess_data.py {PLAN}")
    plan = make_plan(config)
    print(json.dumps(asdict(plan), indent=1) if config.json else "\n".join(plan_lines(plan, config)))


def cli() -> None:
    """Console script emu3-preprocess-data."""
    run_program(main)


if __name__ == "__main__":
    cli()
