"""The errors a user meets. Each message names the file, column, row or key, and says what to do."""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 143


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


class StorageError(RooError):
    """A file could not be read or written, though it may be whole: its storage fails. Jobs exit with 1."""


class TrainingDiverged(RooError):
    """The loss of a batch is not finite; the message names the batch's requests. Jobs exit with 1."""


class PublishRefused(RooError):
    """A model is worse than the published one by more than the config allows. Jobs exit with 1."""


class NoWorkers(RooError):
    """No worker of a job has run for longer than the config allows: it waits for nodes. Jobs exit with 1."""


class NotChecked(RooError):
    """Preflight could not look at all that the run needs: what is not there yet may be wrong. Jobs exit with 1."""


class Evicted(RooError):
    """A worker was told to leave (SIGTERM); the last checkpoint is written, and the run goes on from there."""


class Stopped(RooError):
    """The job was told to end (SIGTERM); the same run name goes on with the run. Jobs exit with 143."""
