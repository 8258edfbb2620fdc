"""The errors a user meets. Each message names the file, column, row or key, and says what to do."""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2


class RooError(Exception):
    """Base of all errors that roo_ray raises on purpose."""


class BadInput(RooError, ValueError):
    """The user's data or config breaks a rule; jobs print the message alone and exit with 2."""


class ConfigError(BadInput):
    """A config or schema file has an unknown key, a wrong type or values that contradict each other."""


class DataError(BadInput):
    """Data does not fit the schema: a missing column, an id outside its table, unequal list lengths."""


class ClusterError(BadInput):
    """The cluster cannot run the job as configured: no CPUs left for Ray Data, too few GPUs."""
