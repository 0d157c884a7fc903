"""The errors that are meant for users."""


class UserError(ValueError):
    """Something that the user gave can't work: one line that names the key or file, its value and what would be right.

    The command line prints it and exits with status 2; everything else is a defect and keeps its traceback.
    """


class TakenError(UserError):
    """Another process is at work in the run's folder."""


class WorkersError(RuntimeError):
    """The work failed on a worker, after all restarts.

    Args:
        rank: the first worker that failed.
        error: what it raised there.
        tracebacks: of all that failed, as text.
    """

    def __init__(self, rank: int, error: Exception, tracebacks: str):
        first_line = str(error).strip().partition("\n")[0]
        super().__init__(f"the work failed on worker {rank}: {type(error).__name__}: {first_line}")
        self.tracebacks = tracebacks


class ClusterError(RuntimeError):
    """The cluster has not what the work needs: one line that names the key, its value and what would be right."""


class StoppedError(Exception):
    """The training was asked to stop (`Rank.stop_wanted`), wrote a checkpoint and ended; the same on every rank.

    Args:
        step: steps done, all of them in the checkpoint; None: no worker was running, whatever there is stays.
    """

    def __init__(self, step: int | None):
        super().__init__(step)
        self.step = step


class SearchError(RuntimeError):
    """No trial of a search came to anything: one line with the reason of the first."""


class SupersededError(RuntimeError):
    """A later start of the run is at work, so this process, cut off perhaps, must write nothing more into it."""


class TrackingError(RuntimeError):
    """MLflow couldn't be reached or refused, where a verb is about nothing else: one line with its URI."""
