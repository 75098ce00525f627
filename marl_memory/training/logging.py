"""Where a run's numbers go: metrics.csv, TensorBoard, Weights & Biases and the display."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from marl_memory.training import tracking
from marl_memory.training.checkpoint import NotWrittenError, naming
from marl_memory.training.display import Display


class MetricsFile:
    """``metrics.csv``: one row per iteration, one column per metric, blank where a row has none.

    Args:
        path: the file; an existing one is read, and continued after `cut_after` has put its end right.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.columns: list[str] = []
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]  # a kill can leave the last line half written
            reader = csv.DictReader(whole.splitlines())
            self.columns = list(reader.fieldnames or [])
            self.rows = [{key: text for key, text in row.items() if text} for row in reader]

    def append(self, row: Mapping[str, float]) -> None:
        """Add one row; a new column rewrites the file, which happens a few times in a run at most."""
        text = {key: repr(value) for key, value in row.items()}
        self.rows.append(text)
        if new := [key for key in text if key not in self.columns]:
            self.columns += new
            self._rewrite()
            return
        with naming(self.path), self.path.open("a", newline="") as stream:
            csv.DictWriter(stream, self.columns, restval="").writerow(text)

    def add_to_last(self, row: Mapping[str, float]) -> None:
        """Add to numbers of the last row what became known after it was written."""
        last = self.rows[-1]
        last |= {key: repr(float(last.get(key, 0.0)) + value) for key, value in row.items()}
        self.columns += [key for key in row if key not in self.columns]
        self._rewrite()

    def cut_after(self, frames: int) -> None:
        """Drop the rows of frames that a restored checkpoint has not seen."""
        self.rows = [row for row in self.rows if int(row["frames"]) <= frames]
        self._rewrite()

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Frames and values of the rows that have this metric."""
        pairs = [(float(row["frames"]), float(row[name])) for row in self.rows if row.get(name)]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def _rewrite(self) -> None:
        writing = self.path.with_suffix(".writing")
        with naming(self.path):
            with writing.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
            writing.replace(self.path)


class Logger:
    """Rows to metrics.csv, to TensorBoard, to Weights & Biases and to the terminal; what is said once, to log.txt.

    Args:
        folder: the run's folder.
        total_frames: where the progress bar ends.
        config: what Weights & Biases is to keep as the run's configuration.
        tensorboard: whether event files are written.
        quiet: no display at all.
        wandb: `null`, `offline` or `online`; files of Weights & Biases lie in the run's folder `wandb`.

    Raises:
        ValueError: for another value of ``wandb``.
        ImportError: if Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_frames: int,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        quiet: bool = False,
        wandb: str | None = None,
    ) -> None:
        tracking.check_mode(wandb)
        self.config, self.wandb, self.tracked = config or {}, wandb, None
        self.metrics = MetricsFile(folder / "metrics.csv")
        self.folder, self.tensorboard, self.writer = folder, tensorboard, None
        self.display = None if quiet else Display(total_frames)

    @contextmanager
    def writing(self, frames: int) -> Iterator[None]:
        """Begin, or begin again, after ``frames`` frames; whatever happens, the files and the terminal are let go."""
        with _tensorboard_tells_only_us():
            try:
                self.start(frames)
                yield
            except BaseException as error:
                try:
                    self.close(failed=True)
                except NotWrittenError as another:
                    if str(another) != str(error):
                        error.add_note(str(another))
                raise
            self.close()

    def start(self, frames: int) -> None:
        """Begin, or begin again, after ``frames`` frames."""
        self.metrics.cut_after(frames)
        if self.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            with naming(self.folder / "tensorboard"):
                self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=max(frames, 0) + 1)
        if self.wandb is not None:
            self.tracked = tracking.begin(self.folder, self.wandb, self.config)
        if self.display is not None:
            self.display.start(max(frames, 0))

    def log(self, row: Mapping[str, float]) -> None:
        """Write one row; ``row["frames"]`` is its place on the x axis."""
        self.metrics.append(row)
        if self.writer is not None:
            with naming(self.folder / "tensorboard"):
                for key, value in row.items():
                    self.writer.add_scalar(key, value, int(row["frames"]))
        if self.tracked is not None:
            tracking.log(self.tracked, row)
        if self.display is not None:
            self.display.show(row)

    def say(self, text: str) -> None:
        """Add a line to ``log.txt``, and show it."""
        with naming(self.folder / "log.txt"), (self.folder / "log.txt").open("a") as stream:
            stream.write(f"{text}\n")
        if self.display is not None:
            print(text, flush=True)

    def close(self, *, failed: bool = False) -> None:
        """Stop the display, and let the files go; whatever happens to one of them, the others are let go too."""
        with ExitStack() as last_first:
            if self.tracked is not None:
                last_first.callback(self.tracked.finish, exit_code=int(failed))
                self.tracked = None
            if self.writer is not None:
                last_first.callback(self._close_writer)
            if self.display is not None:
                last_first.callback(self.display.stop)

    def _close_writer(self) -> None:
        assert self.writer is not None
        with naming(self.folder / "tensorboard"):
            self.writer.close()


@contextmanager
def _tensorboard_tells_only_us() -> Iterator[None]:
    """TensorBoard's thread hands a failed write to our next call: it need not print it as well."""
    before = threading.excepthook
    threading.excepthook = lambda args: (
        None if type(args.thread).__name__ == "_AsyncWriterThread" and args.exc_type is OSError else before(args)
    )
    try:
        yield
    finally:
        threading.excepthook = before
