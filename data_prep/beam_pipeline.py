"""The chunks of a preparation as an Apache Beam pipeline (extra ``[beam]``).

    python -m data_prep.majortom ... --runner DirectRunner
    python -m data_prep.majortom ... --runner FlinkRunner --flink_master=HOST:8081 --environment_type=LOOPBACK
    python -m data_prep.majortom ... --runner DataflowRunner --project=P --region=R --temp_location=gs://B/tmp

One element is one chunk of cells; each is prepared by the same function as on one machine and publishes
its shards atomically, so retries and duplicates of a bundle do no harm and the records are the same.
``--out`` must be a folder that all workers see (a file share, or a bucket mounted as one). What is in the
chunks lies there, too: Dataflow takes no job graph above 10 MB, and the cells of a planet are over a gigabyte.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

from data_prep.chunks import DiskFull, Job, SourceUnavailable, Unit, job_of_chunk, sync, write_chunk

Element = tuple[str, int, int]  # file, first byte, number of the chunk


def run_chunks(job: Job, chunks: Mapping[int, Sequence[Unit]], runner: str, flags: Sequence[str] = ()) -> None:
    """Writes the given chunks with a Beam runner; returns when all are done.

    Args:
      job: source, land cover, options, output.
      chunks: number -> units of the chunks that are not done yet.
      runner: name of a Beam runner.
      flags: further pipeline options, passed on to Beam.

    Raises:
      ValueError: Apache Beam is not installed.
      DiskFull, SourceUnavailable: as the local run does.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(f"--runner {runner} needs Apache Beam: pip install 'terrafm_jax[beam]' ({error})") from error
    if not chunks:
        return
    options = PipelineOptions([f"--runner={runner}", *flags])
    elements = write_elements(job, chunks)
    try:
        with beam.Pipeline(options=options) as pipeline:
            done = (
                pipeline
                | "chunks" >> beam.Create(elements)
                | "spread" >> beam.Reshuffle()
                | "prepare" >> beam.Map(prepare_element)
            )
            _ = done | "count" >> beam.combiners.Count.Globally()
    except Exception as error:  # Beam wraps what a worker raised in its own types
        _raise_known(error)
        raise


def write_elements(job: Job, chunks: Mapping[int, Sequence[Unit]]) -> list[Element]:
    """Writes what is in the chunks to one file in the work folder; an element says where a chunk lies in it."""
    path = job.work / "chunks.pickle"
    elements = []
    with open(path, "wb") as file:
        for number, units in sorted(chunks.items()):
            elements.append((str(path), file.tell(), number))
            pickle.dump((job_of_chunk(job, units), list(units)), file)
    sync(path)
    return elements


def prepare_element(element: Element) -> int:
    """Writes the shards of one chunk; returns its number."""
    path, start, number = element
    with open(path, "rb") as file:
        file.seek(start)
        job, units = pickle.load(file)  # the plan of this very job, written when it started
    return write_chunk(job, number, units, (), lambda key: None)


def _raise_known(error: BaseException) -> None:
    """Raises the failure that the local run would have raised, if the text of Beam's error names it."""
    text = str(error)
    for kind in (DiskFull, SourceUnavailable):
        if kind.__name__ in text:
            line = next((x for x in text.splitlines() if kind.__name__ in x), text)
            raise kind(line.split(f"{kind.__name__}: ", 1)[-1]) from error
