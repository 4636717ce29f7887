import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT

TOOL = ROOT / 'tools/dataset_converters/camvid.py'


@pytest.fixture
def tutorial(tmp_path):
    """Two images a split in the layout of the SegNet tutorial."""
    rng = np.random.default_rng(0)
    source = tmp_path / 'CamVid'
    for split in ('train', 'val', 'test'):
        for folder in (split, f'{split}annot'):
            (source / folder).mkdir(parents=True)
        for name in ('0001TP_1', '0001TP_2'):
            image = cv2.resize(rng.integers(0, 256, (2, 3, 3), np.uint8), (48, 36))
            cv2.imwrite(str(source / split / f'{name}.png'), image)
            cv2.imwrite(str(source / f'{split}annot' / f'{name}.png'), rng.integers(0, 12, (36, 48), np.uint8))
    return source


def convert(source, out):
    return subprocess.run([sys.executable, TOOL, source, out], capture_output=True, text=True)


def test_layout_and_ids(tutorial, tmp_path):
    out = tmp_path / 'camvid'
    done = convert(tutorial, out)
    assert done.returncode == 0, done.stderr
    for split in ('train', 'val', 'test'):
        for name in ('0001TP_1', '0001TP_2'):
            labels = cv2.imread(str(out / f'annotations/{split}/{name}.png'), cv2.IMREAD_UNCHANGED)
            source = cv2.imread(str(tutorial / f'{split}annot/{name}.png'), cv2.IMREAD_UNCHANGED)
            assert (labels == np.where(source == 11, 255, source)).all() and 255 in labels
            image = cv2.imread(str(out / f'images/{split}/{name}.jpg')).astype(int)
            assert abs(image - cv2.imread(str(tutorial / f'{split}/{name}.png'))).mean() < 4


def test_nothing_is_written_from_bad_input(tutorial, tmp_path):
    out = tmp_path / 'camvid'
    (tutorial / 'valannot/0001TP_2.png').unlink()
    done = convert(tutorial, out)
    assert done.returncode and not out.exists()
    assert "wanted one label map for each of its images, got 2 and 1, unmatched: ['0001TP_2']" in done.stderr

    cv2.imwrite(str(tutorial / 'valannot/0001TP_2.png'), np.full((36, 48), 12, np.uint8))
    done = convert(tutorial, out)
    assert done.returncode and not out.exists() and 'ids 0..11, got shape (36, 48), largest id 12' in done.stderr

    done = convert(tutorial / 'nowhere', out)
    assert done.returncode and 'wanted a folder with train/ and trainannot/' in done.stderr


def test_an_existing_folder_is_left_alone(tutorial, tmp_path):
    done = convert(tutorial, tutorial)
    assert done.returncode and 'is there already' in done.stderr
