"""The kinds of error that a user sees: what is wrong, where, and what to do next. All of them are in this file."""


class FaithkdError(ValueError):
    """A user's mistake or a missing piece, told in one message; the command line prints it without a traceback."""


class ParamsError(FaithkdError):
    """A parameter that does not exist or has a bad value: where it stands, what is wrong, what was meant."""


class NotebookError(FaithkdError):
    """A notebook that is missing, unknown, damaged or cannot be executed."""


class KeywordError(FaithkdError, TypeError):
    """A keyword that a function does not have: the nearest one that it has."""
