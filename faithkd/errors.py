"""The one kind of error a user sees: what is wrong, where, and what to do next."""


class FaithkdError(ValueError):
    """A user's mistake or a missing piece, told in one message; the command line prints it without a traceback."""


class ParamsError(FaithkdError):
    """A parameter that does not exist or has a bad value: where it stands, what is wrong, what was meant."""


class NotebookError(FaithkdError):
    """A notebook that is missing, unknown or cannot be executed."""
