"""What all tools share: errors in one line, numbers that are checked, and files that are whole or absent."""

import argparse
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator


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


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Makes a file that is there as a whole or not at all; an older one stays until then.

    Args:
        path: of the file.
        save: writes it to the path that it gets, which is another one.
    """
    unfinished = path.with_name(f'{path.name}.unfinished')
    save(unfinished)
    os.replace(unfinished, path)


def claim(mark: Path, checkpoint: str) -> None:
    """Says whose the results beside a file are, so that those of another model are not taken for them.

    Args:
        mark: the file, which gets the checkpoint's SHA-256.
        checkpoint: a file, or an address, which is known by its name alone.

    Raises:
        InputError: the results are another checkpoint's.
    """
    content = Path(checkpoint).read_bytes() if Path(checkpoint).is_file() else checkpoint.encode()
    digest = hashlib.sha256(content).hexdigest()
    if mark.exists() and mark.read_text().strip() != digest:
        raise InputError(
            f'--out: wanted a folder for {checkpoint}, got {mark.parent} with results of another checkpoint'
        )
    write_whole(mark, lambda path: path.write_text(digest + '\n'))
