"""How a command ends: the exit codes, and the one line that says why."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Part of the command line's interface; numbers never change their meaning."""

    OK = 0
    FAILURE = 1  # anything else, a bug included
    USAGE = 2  # an option, an argument or a field of the request is wrong
    NOT_FOUND = 3  # no such adapter
    REFUSED = 4  # an adapter or base that does not fit, is broken or in use
    EXHAUSTED = 5  # the queue, memory or disk is full; later may help
    UNAVAILABLE = 6  # no server, one that starts or stops, or a store that cannot be read
    TIMEOUT = 7  # --timeout passed
    INTERRUPTED = 130  # Ctrl-C


_BY_STATUS = {
    "INVALID_ARGUMENT": ExitCode.USAGE,
    "OUT_OF_RANGE": ExitCode.USAGE,
    "NOT_FOUND": ExitCode.NOT_FOUND,
    "FAILED_PRECONDITION": ExitCode.REFUSED,
    "ALREADY_EXISTS": ExitCode.REFUSED,
    "ABORTED": ExitCode.REFUSED,
    "PERMISSION_DENIED": ExitCode.REFUSED,
    "UNAUTHENTICATED": ExitCode.REFUSED,
    "RESOURCE_EXHAUSTED": ExitCode.EXHAUSTED,
    "UNAVAILABLE": ExitCode.UNAVAILABLE,
    "DEADLINE_EXCEEDED": ExitCode.TIMEOUT,
}

HELP = (
    "Exit codes: 0 done, 1 failure, 2 wrong usage or request, 3 no such adapter, 4 refused (does not fit, broken "
    "or in use), 5 full (queue, memory or disk), 6 no server or store to be reached, 7 timed out, 130 interrupted."
)


def of_status(code: str) -> ExitCode:
    """The exit code of a gRPC status code's canonical name, as in LorikeetError.code."""
    return _BY_STATUS.get(code, ExitCode.FAILURE)


class Failure(Exception):
    """Ends the command with `message` on stderr."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def one_line(text: str) -> str:
    """`text` with every run of white space made one blank, so that an error stays one line."""
    return " ".join(text.split())
