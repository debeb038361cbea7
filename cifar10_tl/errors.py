"""The one kind of error that is shown to a user as a line rather than a traceback."""


class UserError(Exception):
    """A mistake the user can mend: shown as one ``error:`` line, exit status 2, no traceback."""
