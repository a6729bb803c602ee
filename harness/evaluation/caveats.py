"""Honesty marks: what must be said beside a number so that it is not read as more than it is.

same corpus as calibration    the text that calibrated is another part of the one evaluated
adapted                       a learned transform or a tuner was trained on it, so a gain may be
                              adaptation
learned elsewhere             its matrices come from a file, so it may have been trained on it
first N of M windows          a subset; the same of documents of a task
only corpus                   nothing shows whether a gain holds elsewhere
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


def marks(
    calibrated: Collection[str],
    learned: bool,
    loaded: bool,
    measured: Mapping[str, tuple[int, int]],
    tasks: Mapping[str, int | None],
    tuned: bool = False,
) -> dict[str, list[str]]:
    """{corpus or task: [marks]}.

    calibrated: names of the corpora that calibrated; learned: whether a transform learned from
    them; loaded: or came from a file; measured: {corpus: (windows evaluated, windows there are)};
    tasks: {task: limit of its documents or None}; tuned: whether the quantized weights were trained
    on them.
    """
    told: dict[str, list[str]] = {}
    for corpus, (windows, whole) in measured.items():
        told[corpus] = []
        if corpus in calibrated:
            told[corpus].append("same corpus as calibration")
            if tuned or (learned and not loaded):
                told[corpus].append("adapted")
        if loaded:
            told[corpus].append("learned elsewhere")
        if windows < whole:
            told[corpus].append(f"first {windows} of {whole} windows")
        if len(measured) == 1:
            told[corpus].append("only corpus")
    for task, limit in tasks.items():
        told.setdefault(task, [])  # an evaluation may read of a corpus, too
        if limit is not None:
            told[task].append(f"first {limit} documents")
    return told
