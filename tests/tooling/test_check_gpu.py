"""tools/check_gpu: all but the GPU."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, half_on_cpu, spread


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_says_in_a_line_that_there_is_no_gpu(tool):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', 'tools/check_gpu.sh'], cwd=ROOT, env={**os.environ, 'PATH': path}, capture_output=True, text=True
    )
    said = 'wanted a CUDA device, torch finds none'
    assert (done.returncode, done.stdout, done.stderr) == (1, '', f'check_gpu.sh: {said}\n')
    assert tool('check_gpu.py') == f'check_gpu.py: {said}'


@half_on_cpu
def test_passes_on_the_cpu(tool, capsys):
    assert tool('check_gpu.py', '--device', 'cpu', '--steps', 4) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 + 3 + 2 and all(line.startswith('ok  ') for line in lines)


def test_finds_an_attention_that_is_wrong(tool, monkeypatch):
    monkeypatch.setattr(
        'mmseg_msvit.vit.attention.attend', lambda qkv, *args: qkv[:, 2]
    )  # every token sees itself alone
    assert tool('check_gpu.py', '--device', 'cpu').startswith('plain attention, torch.float32, by one kernel a length:')


def ranks():
    runpy.run_path(str(ROOT / 'tools/check_gpu.py'))['check_ranks'](torch.device('cpu'))


@pytest.mark.slow
def test_two_processes_pass_on_the_cpu():
    spread(ranks, 2)
