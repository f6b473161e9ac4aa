"""Checkpoints written in the background, so that the loop does not wait for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from charlm.config import UserError
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.snapshot import Snapshot


class CheckpointWriter:
    """Writes one snapshot after another in a thread of its own. One that the disk does not take is said, not raised."""

    def __init__(self, run: Run, keep: int, say: Callable[[str], None]):
        """`keep`: how many of the newest checkpoints stay; `say` is called from the thread."""
        self.run, self.keep, self.say = run, keep, say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[str | None] | None = None
        """The newest write; its result is why it failed, or None."""

    def save(self, snapshot: Snapshot, best: bool) -> None:
        """Begin to write, once the write before has ended. Nobody may change the snapshot any more."""
        self.wait()
        self._written = self._thread.submit(self._write, snapshot, best)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._written is not None:
            self._written.result()

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            UserError: the newest snapshot could not be written, so that the run's end is lost.
        """
        self._thread.shutdown()
        if self._written is not None and (complaint := self._written.result()):
            raise UserError(
                f"{self.run.path}: the newest checkpoint is missing: {complaint}; "
                "make room and go on from the one before with --run.resume=true"
            )

    def _write(self, snapshot: Snapshot, best: bool) -> str | None:
        try:
            save_checkpoint(self.run, snapshot, best=best, keep=self.keep)
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            complaint = f"step {snapshot.state['step']:,}: checkpoint not written ({reason})"
            self.say(f"{complaint}; the run goes on, the next try is at the next checkpoint")
            return complaint
        return None
