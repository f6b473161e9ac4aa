"""Checkpoints written in the background, so that the loop does not wait for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from charlm.config import UserError
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import Snapshot


class CheckpointWriter:
    """Writes snapshots one by one in a thread. A failed write is reported, and the run continues."""

    def __init__(self, run: Run, keep: int, say: Callable[[str], None]):
        """`keep`: number of newest checkpoints to keep; `say` is called from the thread."""
        self.run, self.keep, self.say = run, keep, say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[str | None] | None = None
        """Newest write; its result is the reason why it failed, or None."""

    def save(self, snapshot: Snapshot, best: bool) -> None:
        """Start to write, after the previous write has ended. The snapshot must not change any more."""
        self.wait()
        self._written = self._thread.submit(self._write, snapshot, best)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._written is not None:
            self._written.result()

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            UserError: the newest snapshot could not be written, so the end of the run is lost.
        """
        self._thread.shutdown()
        if self._written is not None and (complaint := self._written.result()):
            raise UserError(
                f"{self.run.path}: the newest checkpoint is missing: {complaint}; "
                "make room and continue from the previous one with --run.resume=true"
            )

    def _write(self, snapshot: Snapshot, best: bool) -> str | None:
        try:
            save_checkpoint(self.run, snapshot, best=best, keep=self.keep)
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            complaint = f"step {snapshot.state['step']:,}: checkpoint not written ({reason})"
            self.say(f"{complaint}; the run continues and tries again at the next checkpoint")
            return complaint
        return None
