"""Errors of the load tests: one line that says what to change."""

from adapters.errors import LorikeetError


class ScenarioError(LorikeetError):
    """A scenario that cannot be read or does not go together; the message names its file and field."""

    code = "INVALID_ARGUMENT"
    reason = "SCENARIO_INVALID"


class LoadTestFailed(LorikeetError):
    """A server or Locust did not do its part."""

    code = "FAILED_PRECONDITION"
    reason = "LOAD_TEST_FAILED"
