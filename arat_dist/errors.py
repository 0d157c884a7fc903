"""The errors that are meant for users."""


class UserError(ValueError):
    """Something that the user gave can't work: one line that names the key or file, its value and what would be right.

    The command line prints it and exits with status 2; everything else is a defect and keeps its traceback.
    """


class WorkersError(RuntimeError):
    """The work failed on a worker, after all restarts: the message names it and holds its own error and traceback."""
