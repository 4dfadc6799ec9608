"""What is in indexed datasets, and what a training step reads of them.

python tools/inspect_data.py --prefix PREFIX [--seq_length 5120] [--output DIR --vision_tokenizer DIR]
    a table: documents, ids by kind, lengths, how they pack; with --output a page to look at (DIR/index.html): documents
    with their pictures, windows as packed; with --document N one document
python tools/inspect_data.py --blend PRETRAINING.yaml [...]
    the same for all datasets of a pretraining configuration, with their shares, packed as it packs them
python tools/inspect_data.py --prefix PREFIX --validate true
    hold every document against the grammar, and the files against their manifests; names the first that are wrong
python tools/inspect_data.py --config PRETRAINING.yaml --step N [--output DIR --vision_tokenizer DIR]
    the exact windows of optimizer step N of a run: documents, pictures, weights of labels, padding, cuts;
    --step N --help lists the options, which are pretrain_emu3.py's and a few more
"""

import os
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.section import Count, Name, Number, Section
from megatron_ext.config.validate import validate as validate_config
from megatron_ext.data import KINDS, Data, DocumentDataset, Loader, PackedDataset, build_data
from megatron_ext.data.packing import SHORTEST_CUT, PackingRules
from megatron_ext.data.report import dataset_report, describe_segment, length_histogram, packing_report, window_report
from megatron_ext.data.step_windows import DataRank, StepWindow, documents_in_window, step_windows
from megatron_ext.data.survey import COUNTED_IDS, count_ids, default_workers, judge
from megatron_ext.files import check_folder
from megatron_ext.observe.dataset_page import DatasetPage, Surveyed
from megatron_ext.observe.painter import Painter
from megatron_ext.observe.progress import progress
from megatron_ext.vision import MoVQGAN
from megatron_ext.vocab import Vocabulary, decode_document

MUCH = 1 << 28
"""Ids whose counting takes long enough to be told of."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Section):
    """Describe indexed datasets; with --step N, the windows of a training step instead (--step N --help)."""

    prefix: Name | tuple[Name, ...] = ()
    """Path of a dataset without suffix, or a list of them."""

    blend: Name | None = None
    """Instead of prefix: a pretraining configuration, whose data.train is described and packed as it says."""

    seq_length: Count | None = None
    """Pack into windows of this many ids and report their fill, and the documents that do not fit."""

    document_alignment: Count = 1
    """Alignment for that packing."""

    cut_text_to_fill: bool = False
    """Cut texts to fill what pictures leave of a window, for that packing."""

    document: Number | None = None
    """Number of a document to show, from 0, instead of the report."""

    validate: bool = False
    """Check every document with the grammar, and the files with the manifest."""

    workers: Count | None = None
    """Threads that read the documents; empty takes one per core."""

    output: Name | None = None
    """Folder for a page (index.html) of documents, pictures and windows."""

    vision_tokenizer: Name | None = None
    """Folder of the vision tokenizer of the data: pictures of the page are decoded with it."""

    documents_shown: Number = 24
    """Documents of each dataset on the page, evenly spread."""

    windows_shown: Number = 16
    """Windows of each dataset on the page, evenly spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_length is not None and self.seq_length % self.document_alignment:
            raise InputError(
                f"seq_length {self.seq_length} is not a multiple of document_alignment {self.document_alignment}: "
                "change one of them"
            )

    @property
    def rules(self) -> PackingRules | None:
        """How to pack; None: not at all."""
        if self.seq_length is None:
            return None
        return PackingRules(
            seq_length=self.seq_length,
            alignment=self.document_alignment,
            shortest_cut=SHORTEST_CUT if self.cut_text_to_fill else 0,
        )


@dataclass(frozen=True, kw_only=True)
class InspectStepConfig(RunConfig):
    """Show the exact windows of an optimizer step; all options of pretrain_emu3.py, read as it reads them, and:"""

    step: Count
    """Optimizer step, from 1, as metrics.jsonl counts them."""

    world_size: Count | None = None
    """Ranks of the run, which share the windows; empty takes one data rank: tensor x context parallel size."""

    data_rank: Number | None = None
    """Show the windows of this data rank only."""

    longest_text: Number = 160
    """Characters of a text that are printed."""

    output: Name | None = None
    """Folder for the windows as arrays (windows.npz) and as a page (index.html)."""

    vision_tokenizer: Name | None = None
    """Folder of the vision tokenizer of the data; with output, pictures are drawn."""


def show_document(dataset: DocumentDataset, number: int) -> list[str]:
    """Key, kind, spans and segments of a document.

    Raises:
        InputError: no such document.
    """
    if not 0 <= number < len(dataset):
        raise InputError(f"document is {number}: {dataset.prefix} has documents 0..{len(dataset) - 1}")
    ids = dataset.ids(number)
    sidecar = dataset.sidecar
    spans = " ".join(f"{start}..{end - 1}" for start, end in sidecar.spans.of(number)) or "none"
    return [
        f"document {number} of {dataset.prefix}: {KINDS[sidecar.kinds[number]]}, {len(ids):,} ids",
        f"  key: {sidecar.key(number)}",
        f"  unbreakable: {spans}",
        *(f"  {describe_segment(segment, dataset.vocabulary)}" for segment in decode_document(ids, dataset.vocabulary)),
    ]


def validate(dataset: DocumentDataset, workers: int) -> None:
    """Check files and documents.

    Raises:
        InputError: a document that is none (the lines before it name the first of them, position and reason), or ids
            that are not the manifest's. The sidecar may be another file: rebuilt, it has other keys.
    """
    with ThreadPoolExecutor(1) as beside:  # hashing takes one core, whatever else there is to read
        intact = beside.submit(dataset.check_files)
        with progress(f"validate {dataset.name}", dataset.manifest.num_ids, "ids", Console()) as advance:
            judged = judge(dataset, workers, advance)
        intact_files = intact.result()
    for suffix, is_intact in intact_files.items():
        print(f"  {suffix:<11} {'as the manifest says' if is_intact else 'NOT what the manifest says'}")
    for offence in judged.first:
        print(f"  {offence}")
    if judged.wrong:
        raise InputError(
            f"{dataset.prefix}: {judged.wrong:,} of {len(dataset):,} documents are invalid: preprocess again"
        )
    print(f"  all {len(dataset):,} documents are valid")
    for suffix in (".bin", ".idx"):
        if not intact_files[suffix]:
            raise InputError(f"{dataset.prefix}{suffix} is not what its manifest says: copy it again, or preprocess")


@dataclass(frozen=True)
class Asked:
    """The datasets of the command line, and how they are packed."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    rules: PackingRules | None
    vocabulary: Vocabulary | None = None
    """None: the one beside each dataset."""
    cache_dir: str | None = None

    @classmethod
    def of(cls, config: InspectConfig) -> "Asked":
        """Raises InputError: neither prefix nor blend, or both; a configuration without data."""
        prefixes = (config.prefix,) if isinstance(config.prefix, str) else config.prefix
        if bool(prefixes) == (config.blend is not None):
            raise InputError("give prefix, the path of a dataset without suffix, or blend, a pretraining configuration")
        if config.blend is None:
            return cls(tuple(prefixes), (1.0,) * len(prefixes), config.rules)
        run = load(RunConfig, ["--config", config.blend])
        if not run.data.train:
            raise InputError(f"{config.blend} names no dataset in data.train: add some")
        rules = PackingRules(
            seq_length=run.train.seq_length,
            alignment=run.data.document_alignment,
            shortest_cut=SHORTEST_CUT if run.data.cut_text_to_fill else 0,
            seed=run.data.packing_seed,
        )
        prefixes, weights = zip(*((part.prefix, part.weight) for part in run.data.train), strict=True)
        return cls(prefixes, weights, rules, Vocabulary.load(run.vocab), run.data.cache_dir)

    def datasets(self) -> list[DocumentDataset]:
        """All of them, opened."""
        if self.vocabulary is None:
            return [DocumentDataset.open(Path(prefix)) for prefix in self.prefixes]
        return [DocumentDataset(prefix, self.vocabulary, self.cache_dir) for prefix in self.prefixes]


def survey(asked: Asked, datasets: Sequence[DocumentDataset], workers: int) -> list[Surveyed]:
    """Count and pack the datasets; the packing is kept nowhere but in a configuration's data.cache_dir."""
    surveyed = []
    names = [os.path.basename(prefix) for prefix in asked.prefixes]
    names = names if len(set(names)) == len(names) else list(asked.prefixes)
    for name, prefix, weight, dataset in zip(names, asked.prefixes, asked.weights, datasets, strict=True):
        total = min(dataset.manifest.num_ids, COUNTED_IDS)
        with progress(f"count {name}", total, "ids", Console(quiet=total < MUCH)) as advance:
            counts = count_ids(dataset, workers, advance)
        packed = None
        if asked.rules is not None:
            with tempfile.TemporaryDirectory() as kept_nowhere:
                packed = PackedDataset(prefix, dataset.vocabulary, asked.rules, asked.cache_dir or kept_nowhere)
        share = weight / sum(asked.weights)
        surveyed.append(Surveyed(name=name, dataset=dataset, counts=counts, share=share, packed=packed))
    return surveyed


def inspect_datasets(config: InspectConfig) -> None:
    """Print what `config` asks for of its datasets.

    Raises:
        InputError: no dataset, one that is not whole, the wrong vision tokenizer.
    """
    if config.output is not None:
        check_folder(config.output, "output")
    asked = Asked.of(config)
    workers = config.workers or default_workers()
    datasets = asked.datasets()
    if config.document is not None:
        print("\n".join(show_document(datasets[0], config.document)))
        return
    for dataset in datasets:
        print("\n".join(dataset_report(dataset) + length_histogram(dataset.lengths)))
        print(f"  vocabulary {dataset.manifest.vocabulary}\n  vision tokenizer {dataset.manifest.vision_tokenizer}")
        if asked.rules is not None:
            print("\n".join(packing_report(dataset, asked.rules)))
    if config.validate:
        for dataset in datasets:
            validate(dataset, workers)
        if config.output is None:
            return
    surveyed = survey(asked, datasets, workers)
    _print_table(surveyed)
    if config.output is not None:
        identities = {dataset.manifest.vision_tokenizer for dataset in datasets} - {None}
        painter = Painter(_vision_tokenizer(config.vision_tokenizer, identities))
        page = DatasetPage(surveyed, painter, documents=config.documents_shown, windows=config.windows_shown)
        title = f"Data of {config.blend}" if config.blend else ", ".join(one.name for one in surveyed)
        print(f"wrote {page.write(Path(config.output) / 'index.html', title)}")


def _print_table(surveyed: Sequence[Surveyed]) -> None:
    rows = [one.row() for one in surveyed]
    table = Table(box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "dataset" else "right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else value for value in row.values()))
    Console(highlight=False, width=None if Console().is_terminal else 200).print(table)


def _vision_tokenizer(folder: str | None, identities: Collection[str | None]) -> MoVQGAN | None:
    """The vision tokenizer in `folder`, which must be the data's."""
    if folder is None:
        return None
    from megatron_ext.runtime.device import choose_device
    from megatron_ext.vision import load_vision_tokenizer

    vision = load_vision_tokenizer(folder).to(choose_device(RuntimeConfig(), 0))
    if {vision.identity} != set(identities):
        made_by = ", ".join(sorted(map(str, identities))) or "none"
        raise InputError(
            f"vision_tokenizer {folder} is {vision.identity}, the data was made by {made_by}: "
            "give the one that tokenized it"
        )
    return vision


def inspect_step(config: InspectStepConfig) -> None:
    """Print the windows of a step, and write them where `config` says.

    Raises:
        InputError: what pretrain_emu3.py would refuse; a step that the run took with another global batch; the wrong
            vision tokenizer.
    """
    from megatron_ext.objectives import build_objective
    from megatron_ext.observe.history import consumed_before, recorded_identity

    ranks_per_window = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    world_size = config.world_size or ranks_per_window
    validate_config(config, world_size)
    if config.output is not None:
        check_folder(config.output, "output")
    data_ranks = world_size // ranks_per_window
    if config.data_rank is not None and config.data_rank >= data_ranks:
        raise InputError(f"data_rank is {config.data_rank}: world_size {world_size} has data ranks 0..{data_ranks - 1}")
    vocabulary = Vocabulary.load(config.vocab)
    data = build_data(config.data, config.train, vocabulary, DataRank(0, data_ranks))
    objective = build_objective(config.objective, vocabulary.layout)
    consumed, is_recorded = consumed_before(config.observe.run_dir, config.step, config.train)
    data = _as_it_went_on(data, config.observe.run_dir, consumed)
    windows = step_windows(data.train, consumed, data_ranks, objective.weights)
    weight_sum = sum(int(window.weights_S.sum()) for window in windows)
    header = [
        f"step {config.step:,}: samples {consumed:,}..{consumed + len(windows) - 1:,}, {len(windows)} windows of "
        f"{config.train.seq_length:,} ids, data ranks: {data_ranks}, micro-batches of {config.train.micro_batch_size}; "
        + (f"as {config.observe.run_dir} took it" if is_recorded else "not taken by a run yet"),
        f"weights: visual {objective.vision_weight}, text and structure {objective.text_weight}; their sum "
        f"{weight_sum:,} divides the loss",
    ]
    recorded = recorded_identity(config.observe.run_dir, "data")
    if recorded not in (None, data.train.identity):
        header.append(
            f"NOT the data of {config.observe.run_dir}: it reads {recorded}, this configuration {data.train.identity}"
        )
    shown = [window for window in windows if config.data_rank in (None, window.data_rank)]
    _print_windows(header, shown, data.train, vocabulary, config.longest_text)
    if config.output is not None:
        _write_page(config, shown, data.train, vocabulary, data.vision_tokenizer)


def _as_it_went_on(data: Data, run_dir: str, consumed: int) -> Data:
    """The data of a run whose blend a restart has changed, as its newest checkpoint says.

    Raises:
        InputError: the samples after `consumed` were taken with the blend of before.
    """
    from megatron_ext.checkpoint.store import latest_checkpoint, read_metadata
    from megatron_ext.train import TrainState

    checkpoint = latest_checkpoint(Path(run_dir) / "checkpoints")
    state = TrainState() if checkpoint is None else TrainState.from_dict(read_metadata(checkpoint)["train_state"])
    if state.blend is None or state.blend.first_sample == 0:
        return data
    if consumed < state.blend.first_sample:
        raise InputError(
            f"sample {consumed} of {run_dir} was taken before the blend changed, at sample {state.blend.first_sample}: "
            "its order follows from an earlier checkpoint"
        )
    return data.resumed(state.blend, state.consumed_samples, allow_change=True)


def _print_windows(
    header: list[str], windows: Sequence[StepWindow], loader: Loader, vocabulary: Vocabulary, longest: int
) -> None:
    print("\n".join(header))
    for window in windows:
        documents = documents_in_window(loader.datasets[window.dataset], window.window)
        name = loader.dataset_names[window.dataset]
        print("\n" + "\n".join(window_report(window, documents, name, vocabulary, longest)))


def _write_page(
    config: InspectStepConfig,
    windows: Sequence[StepWindow],
    loader: Loader,
    vocabulary: Vocabulary,
    identity: str | None,
) -> None:
    from megatron_ext.observe.step_page import StepPage

    vision = _vision_tokenizer(config.vision_tokenizer, [identity])
    facts = {
        "step": f"{config.step:,}",
        "windows": str(len(windows)),
        "ids per window": f"{config.train.seq_length:,}",
        "sum of their weights": f"{sum(int(window.weights_S.sum()) for window in windows):,}",
        "data": loader.identity,
    }
    title = f"Step {config.step:,} of {os.path.basename(config.observe.run_dir)}"
    print(f"wrote {StepPage(config.output, loader, vocabulary, vision).write(windows, title, facts)}")


def main(argv: list[str]) -> None:
    """Print what `argv` asks for."""
    if any(word.partition("=")[0] == "--step" for word in argv):
        inspect_step(load(InspectStepConfig, argv, prog="inspect_data.py"))
    else:
        inspect_datasets(load(InspectConfig, argv, prog="inspect_data.py"))


def cli() -> None:
    """Console script emu3-inspect-data."""
    run_program(main)


if __name__ == "__main__":
    cli()
