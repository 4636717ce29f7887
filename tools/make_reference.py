"""Writes docs/reference.md: every public class and function with its options, from docstrings and signatures.

python tools/make_reference.py [docs/reference.md]
"""

import argparse
import inspect
import re
from pathlib import Path
from typing import Callable, List

from docstring_parser import DocstringStyle, parse

import mmseg_msvit
from mmseg_msvit.classification import ClassificationMSViT
from mmseg_msvit.gates.gate import Gate
from mmseg_msvit.gates.losses import GateLoss
from mmseg_msvit.vit.mixed_scale import MixedScale
from mmseg_msvit.vit.token_heads import TokenHead

HEAD = """\
# Reference

What a config's `type` may name once `mmseg_msvit` is imported, the options of each, and what Python code imports. Made
by `tools/make_reference.py` from the docstrings; a test compares them.
"""
GROUPS = {'Backbones': MixedScale, 'Gates': Gate, 'Gate losses': GateLoss, 'Heads on tokens': TokenHead}


def prose(text: str) -> str:
    """A docstring's paragraph in Markdown, on one line."""
    text = re.sub(r':\w+:`~?(?:[\w.]*\.)?(\w+)`', r'`\1`', text or '')
    return ' '.join(text.replace('``', '`').split())


def is_ours(cls: type) -> bool:
    """Whether the project has written a class, and given it options."""
    return cls.__module__.startswith('mmseg_msvit') and '__init__' in vars(cls)


def table(what: Callable) -> List[str]:
    """The options that a class itself adds, or a function has: name, default and meaning."""
    meanings = {param.arg_name: param.description for param in parse(what.__doc__, DocstringStyle.GOOGLE).params}
    parameters = inspect.signature(what.__init__ if inspect.isclass(what) else what).parameters
    rows = []
    for name, param in parameters.items():
        if name == 'self':
            continue
        if param.kind not in (param.VAR_POSITIONAL, param.VAR_KEYWORD):
            default = '' if param.default is param.empty else f'`{param.default!r}`'
            meaning = prose(meanings.get(name, '')).replace('|', r'\|')
            rows.append(f'| `{name}` | {default} | {meaning} |')
    return ['', '| option | default | meaning |', '| --- | --- | --- |', *rows] if rows else []


def described(what: Callable, title: str) -> List[str]:
    """Heading and text, without examples."""
    doc = parse(what.__doc__, DocstringStyle.GOOGLE)
    parts = [part for part in (doc.long_description or '').split('\n\n') if part and '>>>' not in part]
    return [f'### {title}', '', prose(doc.short_description), *(line for part in parts for line in ('', prose(part)))]


def function_entry(function: Callable, title: str) -> str:
    """A function's section."""
    returns = parse(function.__doc__, DocstringStyle.GOOGLE).returns
    lines = described(function, title) + table(function)
    return '\n'.join([*lines, *(['', f'Returns {prose(returns.description)}'] if returns else [])]) + '\n'


def entry(cls: type, title: str) -> str:
    """A class's section."""
    lines = described(cls, title)
    if is_ours(cls):
        lines += table(cls)
    inherited = [f'[{base.__name__}](#{base.__name__.lower()})' for base in cls.__mro__[1:] if is_ours(base)]
    packages = ('mmseg.', 'mmpretrain.')
    theirs = [f"mmseg's `{base.__name__}`" for base in cls.__mro__[1:] if base.__module__.startswith(packages)][:1]
    if inherited or theirs:
        lines += ['', f'And the options of {", ".join(inherited + theirs)}.']
    return '\n'.join(lines) + '\n'


def reference() -> str:
    """The page."""
    classes = [value for value in vars(mmseg_msvit).values() if inspect.isclass(value)]
    classes = {cls.__name__: cls for cls in classes if cls.__name__ in mmseg_msvit.__all__}
    parts = [HEAD]
    for title, base in GROUPS.items():
        names = [name for name, cls in classes.items() if issubclass(cls, base)]
        group = {name: classes.pop(name) for name in sorted(names)}
        shared = {b.__name__: b for cls in group.values() for b in cls.__mro__ if is_ours(b)}
        parts += [f'## {title}\n', *(entry(cls, name) for name, cls in group.items())]
        if base is MixedScale:
            parts.append(entry(ClassificationMSViT, "MSViT, in mmpretrain's registry"))
        parts += [entry(cls, name) for name, cls in shared.items() if name not in group]
    parts += ['## Hooks, metrics, optimizers\n', *(entry(cls, name) for name, cls in sorted(classes.items()))]
    functions = {name: getattr(mmseg_msvit, name) for name in mmseg_msvit.__all__}
    functions = {name: value for name, value in functions.items() if inspect.isroutine(value)}
    parts += ['## Functions\n', *(function_entry(value, name) for name, value in functions.items())]
    return '\n'.join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, nargs='?', default=Path(__file__).parent.parent / 'docs/reference.md')
    args = parser.parse_args()
    args.out.write_text(reference())
    print(args.out)


if __name__ == '__main__':
    main()
