"""The environment variables, each with its values."""

import os


def choice(name: str, values: tuple[str, ...]) -> str:
    """The value of an environment variable; without one, or of an empty one, the first of the values.

    Raises:
        ValueError: it is none of the values.
    """
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise ValueError(f"the environment variable {name} must be one of {', '.join(values)}, but is {value!r}")
    return value
