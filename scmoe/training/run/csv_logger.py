"""metrics.csv: every logged row. While the disk is full, rows are kept in memory (fault 32)."""

import csv
import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from scmoe.training.files import warn_once


def csv_logger(run_dir: Path, resumed_step: int | None) -> CSVLogger:
    """Return the logger of metrics.csv. It keeps the rows before resumed_step; later ones will be logged again.

    Lightning's logger deletes an earlier file.
    """
    path, kept = run_dir / "metrics.csv", []
    if resumed_step is not None and path.exists():
        with path.open(newline="") as file:
            whole = (row for row in csv.DictReader(file) if None not in row.values())  # a crash may leave half a row
            kept = [row for row in whole if int(row["step"]) < resumed_step]
    logger = SteadyCSVLogger(run_dir, name="", version="")
    writer = logger.experiment
    if kept:
        writer.metrics_keys, writer.metrics = list(kept[0]), kept
        logger.save()
    return logger


class SteadyCSVLogger(CSVLogger):
    """Keeps rows in memory, with one warning, while they cannot be written.

    Lightning's logger would end the training and leave half a row, or, after a new column, half a file.
    """

    def save(self) -> None:
        writer, path = self.experiment, Path(self.experiment.metrics_file_path)
        before, keys = path.read_bytes() if path.exists() else None, list(writer.metrics_keys)
        try:
            super().save()
        except OSError as error:
            writer.metrics_keys = keys
            with suppress(OSError):
                _put_back(path, before)
            warn_once(f"{path} cannot be written, its rows stay in memory: {error.strerror or error}")


def _put_back(path: Path, before: bytes | None) -> None:
    """Give a file its earlier content. Where rows were only added it is cut, which takes no room on a full disk."""
    if before is None:
        path.unlink(missing_ok=True)
    elif path.stat().st_size >= len(before) and path.read_bytes()[: len(before)] == before:
        os.truncate(path, len(before))
    else:
        path.write_bytes(before)
