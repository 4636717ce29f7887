"""Writes docs/reference.md: every registered class with its options, from docstrings and signatures.

python tools/make_reference.py [docs/reference.md]
"""

import argparse
import inspect
import re
from pathlib import Path
from typing import List

from docstring_parser import DocstringStyle, parse

import mmseg_msvit
from mmseg_msvit.classification import ClassificationMSViT
from mmseg_msvit.gate_losses import GateLoss
from mmseg_msvit.gates import Gate
from mmseg_msvit.mixed_scale import MixedScale
from mmseg_msvit.token_heads import TokenHead

HEAD = """\
# Reference

What a config's `type` may name once `mmseg_msvit` is imported, and the options of each. Made by
`tools/make_reference.py` from the docstrings; a test compares them.
"""
GROUPS = {'Backbones': MixedScale, 'Gates': Gate, 'Gate losses': GateLoss, 'Heads on tokens': TokenHead}


def prose(text: str) -> str:
    """A docstring's paragraph in Markdown, on one line."""
    text = re.sub(r':\w+:`~?(?:[\w.]*\.)?(\w+)`', r'`\1`', text or '')
    return ' '.join(text.replace('``', '`').split())


def is_ours(cls: type) -> bool:
    """Whether the project has written a class, and given it options."""
    return cls.__module__.startswith('mmseg_msvit') and '__init__' in vars(cls)


def table(cls: type) -> List[str]:
    """The options that a class itself adds: name, default and meaning."""
    meanings = {param.arg_name: param.description for param in parse(cls.__doc__, DocstringStyle.GOOGLE).params}
    rows = []
    for name, param in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if param.kind not in (param.VAR_POSITIONAL, param.VAR_KEYWORD):
            default = '' if param.default is param.empty else f'`{param.default!r}`'
            meaning = prose(meanings.get(name, '')).replace('|', r'\|')
            rows.append(f'| `{name}` | {default} | {meaning} |')
    return ['', '| option | default | meaning |', '| --- | --- | --- |', *rows] if rows else []


def entry(cls: type, title: str) -> str:
    """A class's section."""
    doc = parse(cls.__doc__, DocstringStyle.GOOGLE)
    lines = [f'### {title}', '', prose(doc.short_description)]
    if doc.long_description:
        lines += [line for part in doc.long_description.split('\n\n') for line in ('', prose(part))]
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
    return '\n'.join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, nargs='?', default=Path(__file__).parent.parent / 'docs/reference.md')
    args = parser.parse_args()
    args.out.write_text(reference())
    print(args.out)


if __name__ == '__main__':
    main()
