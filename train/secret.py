"""What of the environment must not be written down: the values of variables that are named like keys and passwords."""

import os
import re

_SECRET = re.compile(r"(?:^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
_SHORTEST = 8  # what is shorter (`true`, a port) stands in many a text by chance


def is_secret(name: str) -> bool:
    """Whether a variable of that name holds what must not be written down."""
    return _SECRET.search(name) is not None


def secret_in(text: str) -> str | None:
    """The name of a secret variable of this process whose value stands in a text; None if there is none."""
    return next((name for name, value in _secrets().items() if value in text), None)


def redacted(text: str) -> str:
    """The text with the variable's name in place of every secret's value."""
    for name, value in _secrets().items():
        text = text.replace(value, f"[{name}]")
    return text


def _secrets() -> dict[str, str]:
    """Secret variables, longest values first, since one may hold another. Where a file lies (``..._KEY_PATH``) is
    none."""
    found = {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}
    names = sorted(found, key=lambda name: -len(found[name]))
    return {name: found[name] for name in names if not os.path.exists(found[name])}  # noqa: PTH110 - Path raises at long names
