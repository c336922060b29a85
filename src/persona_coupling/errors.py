"""The errors a user can act on. Each message says what is wrong, where, and what to do; no traceback is shown for them."""


class UserError(Exception):
    """Something about the request, the inputs or the machine is wrong, and the message says how to mend it."""


class CorruptArtifact(UserError):
    """A stored artifact does not match its manifest."""


class GuardError(Exception):
    """A guard against a known failure mode fired: the run would have produced a number that means something else."""
