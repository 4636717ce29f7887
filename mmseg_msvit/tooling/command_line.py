"""What all tools share: errors in one line, checked numbers, tables, and files that are whole or absent."""

import argparse
import hashlib
import json
import os
import struct
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence, Union

import cv2
import torch
from rich.console import Console
from rich.table import Table

# Where a tool runs unless it is told.
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


class InputError(ValueError):
    """What a user gave cannot be used; the message alone says why, so that tools show no traceback."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its first one, or, where it says nothing, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with the message of an :class:`InputError`."""
    try:
        yield
    except InputError as error:
        raise SystemExit(str(error)) from None


# What a file that is not as it should be makes other libraries raise.
OF_FILES = (
    OSError, ValueError, ArithmeticError, AssertionError, RuntimeError, SyntaxError, cv2.error, zlib.error,
    struct.error,
)  # fmt: skip


@contextmanager
def about(file: Union[str, Path]) -> Iterator[None]:
    """Names the file in whatever goes wrong with it inside the ``with`` block.

    A tool that makes something of each file goes on with the next one, and lists these errors at its end. One whose
    answer is of all files together stops at the first.

    Raises:
        InputError: of what files are to blame for; any other error goes on as it is, below a line with the file.
    """
    try:
        yield
    except OF_FILES as error:
        message = str(error) if isinstance(error, InputError) else first_line(error)
        raise InputError(message if str(file) in message else f'{file}: {message}') from error
    except Exception:
        print(f'The error below came with {file}', file=sys.stderr)
        raise


def positive(text: str) -> int:
    """A whole number from 1, as an argument's ``type``."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'wanted a whole number from 1, got {text!r}')
    return int(text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows, each with its name first, below their columns; a name has none."""
    table = Table(title=title)
    for column in ('', *columns):
        table.add_column(column, justify='right' if column else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)  # where there is no terminal, too


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Makes a file that is there as a whole or not at all; an older one stays until then.

    Args:
        path: of the file.
        save: writes it to the path that it gets, which is another one.
    """
    unfinished = path.with_name(f'{path.name}.unfinished')
    save(unfinished)
    os.replace(unfinished, path)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(value, indent=2) + '\n'))


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(file: str) -> str:
    """SHA-256 of a file; of an address, which is known by its name alone."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else digest(file)


def claim(mark: Path, **settings) -> None:
    """Notes in a file what the results beside it depend on; refuses if they are there already and of other settings.

    Args:
        mark: the file, JSON.
        settings: what the results depend on.

    Raises:
        InputError: the results are of other settings; the message names them.
    """
    known = json.loads(mark.read_text()) if mark.exists() else settings
    other = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    if other:
        wanted, got = (', '.join(f'{name} {str(each.get(name))[:12]}' for name in other) for each in (settings, known))
        raise InputError(f'--out: wanted a folder for results of {wanted}, got {mark.parent} with those of {got}')
    write_json(mark, settings)
