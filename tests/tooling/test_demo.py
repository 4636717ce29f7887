"""The demo page in a browser, and what it shows."""

import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, randomize, tiny_segmentor
from mmseg.registry import MODELS
from PIL import Image

from mmseg_msvit.gates.from_outside import as_dense
from mmseg_msvit.measuring.inspection import look
from mmseg_msvit.tooling.command_line import InputError
from mmseg_msvit.tooling.explorer import Explorer
from mmseg_msvit.tooling.testset import FileReader


def build(config):
    model = MODELS.build(config.model)
    randomize(model)
    return model.eval()


@pytest.fixture
def explorer(config):
    return Explorer(build(config), FileReader(config))


@pytest.fixture
def image(scenes):
    return (scenes / 'images/val/0000.png').read_bytes()


def test_all_fine_is_the_dense_model(explorer, image):
    model = explorer.model
    select = model.backbone.select
    model.backbone.input_scale, select.token_budget = 0.7, 12
    with as_dense(model):
        _, tokens, _ = look(model, explorer.open(image).data)
    assert tokens.lengths == [37]
    assert (model.backbone.input_scale, select.token_budget, select.threshold) == (0.7, 12, 0.5)


def test_more_of_either_knob_is_more_tokens(explorer, image):
    explorer.backbone.select.threshold = 0.3
    for knob, values in dict(threshold=(0, 1), budget=(0.3, 0.7, 1)).items():
        found = [explorer.look(image, knob, value) for value in values]
        tokens, gmacs = ([f[what] for f in found] for what in ('tokens', 'gmacs'))
        assert tokens == sorted(tokens) and gmacs == sorted(gmacs) and tokens[0] < tokens[-1] == 37
        assert found[-1]['agreement'] == 1 and gmacs[-1] >= found[-1]['dense_gmacs']  # and the gate
        assert all(
            f['agreement'] <= 1 and f['tokens'] <= value * 37 for f, value in zip(found, values) if knob == 'budget'
        )
    assert explorer.backbone.select.threshold == 0.3 and explorer.backbone.select.token_budget is None
    assert explorer.open.cache_info().misses == 1  # the dense model ran for the first look alone


def test_pictures_have_one_size_and_say_what_they_should(explorer, image):
    found = explorer.look(image, 'budget', 0.5)
    pictures = found['pictures']
    assert {picture.shape for picture in pictures.values()} == {(480, 480, 3)}
    red = (pictures['difference'] == (230, 30, 60)).all(2).mean()
    assert red == pytest.approx(1 - found['agreement']) and 0 < red < 1
    colours = {tuple(colour) for colour in found['classes'].values()}
    assert colours <= {tuple(colour) for colour in explorer.reader.palette} and len(colours) == len(found['classes'])


def test_one_logit_for_two_classes(config, image):
    """Of which mmseg predicts floats."""
    config.model = tiny_segmentor(dict(num_classes=2, out_channels=1, threshold=0.5))
    config.model.data_preprocessor = dict(type='SegDataPreProcessor')
    explorer = Explorer(build(config), FileReader(config))
    assert len(explorer.look(image, 'budget', 0.5)['classes']) <= 2


def test_large_images_are_reduced_and_no_picture_is_refused(explorer, monkeypatch):
    monkeypatch.setattr('mmseg_msvit.tooling.explorer.LONGEST', 100)
    _, jpeg = cv2.imencode('.jpg', np.zeros((200, 400, 3), np.uint8))
    assert explorer.open(jpeg.tobytes()).pixels.shape == (50, 100, 3)
    _, line = cv2.imencode('.png', np.zeros((1, 400, 3), np.uint8))
    assert explorer.open(line.tobytes()).pixels.shape == (1, 100, 3)
    for broken in (b'', b'no picture', jpeg.tobytes()[:20]):
        with pytest.raises(InputError, match='image: wanted a picture .* got a file that is none or is broken'):
            explorer.look(broken, 'budget', 0.5)
    for knob, value in (('budget', 2), ('size', 0.5), ('threshold', float('nan'))):
        with pytest.raises(InputError, match=rf'{knob}: wanted a threshold or a budget in \[0, 1\], got {value:g}'):
            explorer.look(jpeg.tobytes(), knob, value)


def test_without_a_checkpoint_it_says_where_to_get_one(tool, monkeypatch, tmp_path):
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools')
    monkeypatch.setattr('conftest.ROOT', tmp_path)
    end = tool('demo.py')
    assert end.startswith(
        f'CHECKPOINT: wanted {tmp_path}/work_dirs/quickstart/iter_400.pth, which is not there: tools/qu'
    )
    assert tool('demo.py', 'config.py') == 'CHECKPOINT: wanted the weights of config.py, got none'


@pytest.mark.slow
def test_animation_and_picture(toy, scenes, tool, tmp_path):
    out = '--animation', tmp_path / 'demo.webp', '--picture', tmp_path / 'photo.jpg'
    image = scenes / 'images/val/0000.png'
    assert tool('demo_animation.py', *toy, image, *out) is None
    picture, animation = Image.open(tmp_path / 'photo.jpg'), Image.open(tmp_path / 'demo.webp')
    assert picture.width == 1600 and animation.width == 960 and animation.n_frames == 22
    first = np.asarray(animation.convert('RGB')).astype(int)
    animation.seek(11)
    left, right = np.split(abs(np.asarray(animation.convert('RGB')) - first), 2, axis=1)
    assert left.mean() > right.mean() > 0  # tokens change more than the prediction
    end = tool('demo_animation.py', 'config.py', 'weights.pth', 'no.png')
    assert end == 'image: wanted a file, got no.png, which is not there'


@pytest.fixture
def served(toy):
    """The address of the tool, as a user starts it."""
    command = [sys.executable, '-W', 'ignore', 'tools/demo.py', *toy]
    tool = subprocess.Popen([*command, '--port', '0'], cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True)
    address = next((line.split()[0] for line in tool.stdout if line.startswith('http://')), None)
    yield address
    tool.terminate()
    tool.wait()


@pytest.fixture
def browser():
    found = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if found is None:
        pytest.skip('needs a Chromium to play with the page')
    return found


@pytest.mark.slow
def test_in_a_browser(browser, served, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    assert served.startswith('http://127.0.0.1:')
    colours = np.kron(np.random.default_rng(0).integers(0, 256, (5, 7, 3)), np.ones((32, 32, 1))).astype(np.uint8)
    cv2.imwrite(str(tmp_path / 'image.jpg'), colours)
    (tmp_path / 'broken.jpg').write_bytes(b'no picture')
    expect.set_options(timeout=60000)  # on a machine with other work
    with sync_playwright() as play:
        page = play.chromium.launch(executable_path=browser, args=['--no-sandbox']).new_page()
        asked, errors = [], []
        page.on('request', lambda request: asked.append(request.url))
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.goto(served)
        tokens = page.locator('#tokens')
        expect(tokens).to_be_visible()  # of the example
        expect(page.locator('#numbers')).to_contain_text('of 37')

        page.set_input_files('#file', tmp_path / 'image.jpg')  # 224 x 160 pixels are 14 x 10 cells
        expect(page.locator('#numbers')).to_contain_text('of 141')
        for value, wanted in (('1', '141'), ('0', '36')):
            page.locator('#value').fill(value)
            expect(tokens).to_have_text(wanted)
        page.get_by_role('radio', name='budget').check()
        page.locator('#value').fill('0.5')
        expect(tokens).to_have_text('69')
        assert page.evaluate('[...document.images].map(i => i.naturalWidth)') == [672] * 4
        page.set_viewport_size(dict(width=360, height=800))
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        places = [page.locator(name).bounding_box() for name in ('#drop', '#controls')]
        assert places[0]['y'] + places[0]['height'] <= places[1]['y']

        page.set_input_files('#file', tmp_path / 'broken.jpg')
        expect(page.get_by_role('alert')).to_contain_text('image: wanted a picture')
        expect(tokens).to_be_hidden()
        assert errors == []
        assert all(url.startswith((served, 'data:')) for url in asked), asked
