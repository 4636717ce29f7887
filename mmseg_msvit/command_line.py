"""What all tools share on the command line: errors in one line, and numbers that are checked."""

import argparse
from contextlib import contextmanager
from typing import Iterator


class InputError(ValueError):
    """What a user gave cannot be used; the message alone says why, so that tools show no traceback."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with the message of an :class:`InputError`."""
    try:
        yield
    except InputError as error:
        raise SystemExit(str(error)) from None


def positive(text: str) -> int:
    """A whole number from 1, as an argument's ``type``."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'wanted a whole number from 1, got {text!r}')
    return int(text)
