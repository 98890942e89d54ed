"""The errors a user can cause or meet: one to three sentences that end with the fix."""


class LpdeployError(Exception):
    """Base of every error that a command prints as one line and exits 1 for."""


class RecipeError(LpdeployError):
    """A recipe file that cannot be read, or names an unknown command or option."""


class ArtifactError(LpdeployError):
    """A model, run or exported folder that is missing, in the way, changed or unusable."""


class RunInUseError(LpdeployError):
    """A run that another process is reading or writing."""


class DataError(LpdeployError):
    """A data source that cannot be read or holds nothing usable."""


class MissingDependencyError(LpdeployError):
    """An optional library that the asked-for work needs is not installed."""


class NonFiniteError(LpdeployError):
    """A loss or gradient became NaN or infinite."""


class RankLostError(LpdeployError):
    """Another process of a run with several is gone or does not answer."""


class OtherRankError(LpdeployError):
    """An error that every rank meets and another rank reports. Nothing needs to be said here."""


class RunEndedError(LpdeployError):
    """A run was told to end before it was complete; its message ends with how to go on."""

    SENTENCE = "The run was told to end."
    HINT = "Go on with `resume=True`."


class ParityError(LpdeployError):
    """Two stages that must compute the same thing do not."""
