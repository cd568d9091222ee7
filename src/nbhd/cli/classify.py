"""``nbhd classify``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from nbhd._text import printable, width
from nbhd.cli._console import check_output, choose_format, note, same_file, track, warn_of_instruction_set
from nbhd.cli._errors import SOME_INPUTS_FAILED
from nbhd.errors import ArgumentError

if TYPE_CHECKING:
    from nbhd.tasks.classification.results import Writer
    from nbhd.tasks.inputs import Input


class Format(StrEnum):
    """How results are written."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


class Runtime(StrEnum):
    """What runs the model."""

    torch = "torch"
    onnx = "onnx"
    torch_export = "torch-export"
    aoti = "aoti"


def classify(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Pictures, folders of them, or glob patterns.")],
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, help="Labels for each picture, at most all there are.")
    ] = 5,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="FOLDER|FILE|HUB_ID",
            help="The model, or a file of nbhd export; by default the one that comes with nbhd.",
        ),
    ] = None,
    runtime: Annotated[
        Runtime | None,
        typer.Option(help="What has to run the model: an error if that takes another file. By default what fits."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, ...; by default the best one here.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures the model sees at once; by default 16 on a CPU, 64 elsewhere.")
    ] = None,
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="By default what the ending of --output says, or table.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the results here, whole or not at all.")
    ] = None,
) -> None:
    r"""Name what is in pictures: the most probable labels of each, with their probabilities.

    What is a picture is decided by the bytes of a file, not by its name. Folders are searched to the bottom, hidden
    files passed over. A file named twice is classified once. Whatever cannot be read is named on standard error and
    skipped, and the exit status is then 1.

    \b
    Examples:
      nbhd classify photo.jpg
      nbhd classify photos/ 'more/**/*.png' --top-k 1
      nbhd classify photos/ --format json > labels.json
      nbhd classify photos/ --output labels.parquet --model ./my-model --device cuda
      nbhd classify photos/ --runtime onnx --model nat.onnx
    """
    _check_runtime(runtime, model)
    if output == "-":
        output = None
    if output is not None:
        check_output(output)
    if output is None and format is Format.parquet:
        raise ArgumentError("--format parquet goes into a file. Give --output FILE.")
    written_as = choose_format(format, output, Format)

    from nbhd.tasks.inputs import find_inputs, without_duplicates

    inputs, repeated = without_duplicates(find_inputs(paths))
    if output is not None:
        inputs = _without_output(output, inputs)
    if repeated:
        note(f"{repeated} file{' is' if repeated == 1 else 's are'} named more than once; each is classified once")

    from nbhd.tasks.classification import Classifier

    _quieten()
    warn_of_instruction_set()
    classifier = Classifier(model, device)
    if runtime is not None and classifier.runtime != runtime.value:
        raise ArgumentError(f"--runtime {runtime}: {model} runs in {classifier.runtime}. {_HOW.format(runtime)}")
    results = classifier.stream(inputs, top_k, batch_size)
    # On a terminal the rows of the table themselves show how far the work is.
    if not (output is None and sys.stdout.isatty()):
        results = track(results, len(inputs), "classifying")

    failed = 0
    with _writer(written_as, output, inputs, classifier.labels) as writer:
        for result in results:
            if result.error is not None:
                failed += 1
                note(f"{result.path or repr('')}: {result.error}")
            writer.write(result)
        writer.finish()
    if output is not None:
        note(f"wrote {output}")
    if failed:
        note(f"{failed} of {len(inputs)} could not be classified")
        raise typer.Exit(SOME_INPUTS_FAILED)


_HOW = "Make a file for it: nbhd export --to {} -o FILE, and name that with --model."


def _check_runtime(runtime: Runtime | None, model: str | None) -> None:
    """Refuse what needs no look into the file."""
    if runtime not in (None, Runtime.torch) and (model is None or os.path.isdir(model)):
        named = "the model that comes with nbhd" if model is None else f"the folder {model}"
        raise ArgumentError(f"--runtime {runtime} runs exported files, not {named}. {_HOW.format(runtime)}")


def _without_output(output: str, inputs: list[Input]) -> list[Input]:
    """Refuse an output that would replace an input.

    Results that an earlier run left in a folder that is searched are no input: they are taken out.
    """
    if not os.path.exists(output):
        return inputs

    from nbhd.tasks.images import is_image

    same = [item for item in inputs if item.error is None and same_file(item.path, output)]
    if any(item.named or is_image(item.path) for item in same):
        raise ArgumentError(f"--output {output}: this is one of the inputs and would be lost. Name another file.")
    return [item for item in inputs if item not in same] if same else inputs


@contextlib.contextmanager
def _writer(format: Format, output: str | None, inputs: Iterable[Input], labels: list[str]) -> Iterator[Writer]:
    from nbhd._files import write_whole
    from nbhd.tasks.classification.results import FORMATS, TableWriter, make_writer

    with contextlib.ExitStack() as stack:
        stream: IO[Any]
        if output is None:
            stream = _stdout(utf8=format is not Format.table)
        else:
            stream = stack.enter_context(write_whole(output, "w" if FORMATS[format.value] else "wb"))
        writer: Writer
        if format is Format.table:
            paths = max((width(printable(item.path)) for item in inputs if item.error is None), default=0)
            writer = TableWriter(stream, paths, max(map(width, labels)), bold=output is None and _in_colour(stream))
        else:
            writer = make_writer(format.value, stream)
        with contextlib.closing(writer):
            yield writer


def _in_colour(stream: IO[str]) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")  # see no-color.org


def _stdout(utf8: bool) -> IO[str]:
    """Standard output, which must not fail on a file name, and is UTF-8 for formats that are read by programs."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        if utf8:
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout


def _quieten() -> None:
    """Keep what libraries say about themselves off standard error: a command speaks in its own words."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    # nbhd's own warnings (a slow backend) are for the user; those of the libraries below are for us.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"nbhd\.")
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
