import cv2
import numpy as np
import pytest

TOOL = 'dataset_converters/camvid.py'


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


def test_layout_and_ids(tutorial, tool, tmp_path):
    out = tmp_path / 'camvid'
    assert tool(TOOL, tutorial, out) is None
    for split in ('train', 'val', 'test'):
        for name in ('0001TP_1', '0001TP_2'):
            labels = cv2.imread(str(out / f'annotations/{split}/{name}.png'), cv2.IMREAD_UNCHANGED)
            source = cv2.imread(str(tutorial / f'{split}annot/{name}.png'), cv2.IMREAD_UNCHANGED)
            assert (labels == np.where(source == 11, 255, source)).all() and 255 in labels
            image = cv2.imread(str(out / f'images/{split}/{name}.jpg')).astype(int)
            assert abs(image - cv2.imread(str(tutorial / f'{split}/{name}.png'))).mean() < 4


def test_nothing_is_written_from_bad_input(tutorial, tool, tmp_path):
    out = tmp_path / 'camvid'
    (tutorial / 'valannot/0001TP_2.png').unlink()
    said = r"wanted one label map for each of its images, got 2 and 1, unmatched: \['0001TP_2'\]"
    with pytest.raises(ValueError, match=said):
        tool(TOOL, tutorial, out)
    cv2.imwrite(str(tutorial / 'valannot/0001TP_2.png'), np.full((36, 48), 12, np.uint8))
    with pytest.raises(ValueError, match=r'ids 0..11, got shape \(36, 48\), largest id 12'):
        tool(TOOL, tutorial, out)
    with pytest.raises(FileNotFoundError, match='wanted a folder with train/ and trainannot/'):
        tool(TOOL, tutorial / 'nowhere', out)
    assert not out.exists()


def test_an_existing_folder_is_left_alone(tutorial, tool):
    assert tool(TOOL, tutorial, tutorial).endswith('is there already')
