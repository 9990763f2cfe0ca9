"""The exception for what the user can put right."""


class Failure(Exception):
    """Ends the program with one line on stderr and this exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def reason(error: BaseException) -> str:
    """The part of an exception that tells something, on one line."""
    cause = getattr(error, "reason", error)
    return " ".join(str(getattr(cause, "strerror", None) or cause or type(error).__name__).split())
