"""Packaging. Distribution name = import name = ``mmseg_msvit``.

``mim`` looks for a package's configs and tools in ``<package>/.mim``: copies in a wheel, links in an editable install.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_FILES = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """``build_py`` that also fills ``mmseg_msvit/.mim``."""

    def run(self):
        super().run()
        if self.editable_mode:
            self.fill_mim(ROOT / 'mmseg_msvit' / '.mim', link=True)
        else:
            self.fill_mim(Path(self.build_lib) / 'mmseg_msvit' / '.mim', link=False)

    @staticmethod
    def fill_mim(target, link):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM_FILES:
            source, destination = ROOT / name, target / name
            if link:
                destination.symlink_to(os.path.relpath(source, target))
            elif source.is_dir():
                shutil.copytree(source, destination, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(source, destination)


setup(
    name='mmseg_msvit',
    version=re.search(r"__version__ = '(.+)'", (ROOT / 'mmseg_msvit/__init__.py').read_text())[1],
    description='MSViT: learned mixed-scale tokens for the vision transformers of MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmseg_msvit', 'mmseg_msvit.*']),
    install_requires=[
        'torch>=2.1.0',
        'mmengine>=0.10.0,<1.0.0',
        'mmcv>=2.0.0rc4,<2.2.0',
        'mmsegmentation>=1.2.0,<2.0.0',
        'opencv-python',
        'ftfy',
        'regex',
    ],
    extras_require={
        'classification': ['mmpretrain>=1.2.0'],
        'demo': ['flask', 'matplotlib', 'pillow>=10.4', 'rich'],
        'export': ['onnx', 'onnxruntime', 'onnxscript', 'rich'],
        'tools': ['jinja2', 'matplotlib', 'rich'],
    },
    cmdclass={'build_py': BuildPyWithMim},
    zip_safe=False,
    include_package_data=False,
)
