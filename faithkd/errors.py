"""The one kind of error a user sees: what is wrong, where, and what to do next."""


class FaithkdError(ValueError):
    """A user's mistake or a missing piece, told in one message; the command line prints it without a traceback."""
