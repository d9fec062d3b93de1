"""The exceptions that cross actors: picklable, each with its cause and its remedy.

Every error a person can meet says what went wrong, where, and which key to change. Nothing here imports an
engine, so unpickling one in the driver never drags vLLM or torch in.
"""

from __future__ import annotations


class RaysysError(Exception):
    """Base of all errors raised on purpose. `remedy` is what a person can do about it."""

    def __init__(self, message: str, remedy: str = ""):
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class ConfigError(RaysysError):
    """The run as configured cannot work. Raised before any actor starts."""


class DataError(RaysysError):
    """A row or a file is wrong. Retrying elsewhere does not help."""


class InfrastructureError(RaysysError):
    """A process, a node or an engine failed. The same work may succeed elsewhere."""


class DeadlineError(InfrastructureError):
    """A wait across actors ran out. Names the actor, the operation and the knob that sets the limit."""

    def __init__(self, actor: str, operation: str, seconds: float, knob: str):
        super().__init__(f"{actor} did not finish '{operation}' within {seconds:g} s", f"raise {knob} if this is normal")
        self.actor, self.operation, self.seconds, self.knob = actor, operation, seconds, knob

    def __reduce__(self):
        return (type(self), (self.actor, self.operation, self.seconds, self.knob))


class PlacementError(InfrastructureError):
    """The cluster cannot give what was asked for."""


class WeightSyncError(InfrastructureError):
    """Weights did not arrive as they left, or the engine does not compute with them."""


class BucketError(WeightSyncError):
    """A bucket's bytes are not those that left. `arrived` are its tensors' digests, by which the trainer can tell which is wrong."""

    def __init__(self, where: str, index: int, arrived: list[str]):
        super().__init__(f"{where} arrived with other bytes than left", "a whole push makes the engine usable again")
        self.where, self.index, self.arrived = where, index, arrived

    def __reduce__(self):
        return (type(self), (self.where, self.index, self.arrived))


class SearchError(InfrastructureError):
    """The search service gave no usable answer, however often it was asked. The query is not to blame."""

    def __init__(self, url: str, attempts: int, seconds: float, cause: str):
        tries = f"{attempts} attempt{'' if attempts == 1 else 's'}"
        super().__init__(
            f"search service {url} gave no usable answer in {tries} and {seconds:.1f} s, at last: {cause}",
            "start it or correct search.url; raise search.timeout if it is slow, search.retries or search.deadline if it comes and goes",
        )
        self.url, self.attempts, self.seconds, self.cause = url, attempts, seconds, cause

    def __reduce__(self):
        return (type(self), (self.url, self.attempts, self.seconds, self.cause))


class SearchRefused(DataError):
    """The search service says that the request itself is wrong. Asking again does not help."""

    def __init__(self, url: str, status: int, cause: str):
        message = f"search service {url} refused a request with HTTP {status}: {cause}"
        super().__init__(message, "check search.url, search.topk and the query")
        self.url, self.status, self.cause = url, status, cause

    def __reduce__(self):
        return (type(self), (self.url, self.status, self.cause))


class NumericsError(RaysysError):
    """A loss or a gradient is not finite."""


class CheckpointError(RaysysError):
    """A resume point is missing, incomplete or of another shape."""
