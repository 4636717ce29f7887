"""A page to play with: drop an image, move threshold or budget, and see what the tokens cost and what they keep.

    python tools/demo.py                       # the model that tools/quickstart.sh has trained
    python tools/demo.py CONFIG CHECKPOINT     # any segmentor with an MSViT, such as tools/fit_gate.py makes

Shows tokens, the gate's probability of coarse, prediction, and where that differs from the same model with all tokens.
The page is served to this machine alone and loads nothing from anywhere else. Needs the extra: pip install '.[demo]'.
"""

import argparse
import base64
import logging
from pathlib import Path
from threading import Lock
from typing import Optional

import cv2
from flask import Flask, Response, render_template_string, request, send_file
from werkzeug.serving import make_server

from mmseg_msvit.tooling.command_line import DEVICE, InputError, one_line_errors
from mmseg_msvit.tooling.explorer import Explorer
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import FileReader, load_testset

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = (
    ROOT / 'configs/toy/segmenter_msvit-mini_mask_1xb8-400_toy-scenes-256x256.py',
    ROOT / 'work_dirs/quickstart/iter_400.pth',
)


def as_url(picture) -> str:
    """(H, W, 3) uint8 RGB as a data URL."""
    _, jpeg = cv2.imencode('.jpg', picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return f'data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}'


def make_app(explorer: Explorer, config: str, example: Optional[Path]) -> Flask:
    """The page, an image to begin with, and what the model makes of an image."""
    app, one_at_a_time = Flask(__name__, static_folder=None), Lock()
    app.config['MAX_CONTENT_LENGTH'], app.json.sort_keys = 64 * 2**20, False
    page = (Path(__file__).parent / 'demo.html').read_text()

    @app.get('/')
    def show():
        threshold = explorer.backbone.select.threshold
        return render_template_string(page, config=Path(config).stem, threshold=threshold, example=example is not None)

    @app.get('/example')
    def send_example():
        return send_file(example)

    @app.post('/look')
    def look():
        try:
            image, value = request.files['image'].read(), float(request.form['value'])
            with one_at_a_time:
                found = explorer.look(image, request.form['knob'], value)
        except InputError as error:
            return dict(error=str(error)), 400
        return {**found, 'pictures': {name: as_url(picture) for name, picture in found['pictures'].items()}}

    @app.after_request
    def at_home(response: Response) -> Response:
        """The browser keeps to what comes from here."""
        response.headers['Content-Security-Policy'] = "default-src 'self' 'unsafe-inline' data: blob:"
        return response

    return app


def find_example(config) -> Optional[Path]:
    """The first image of the config's test set, if that is there."""
    try:
        return Path(load_testset(config).get_data_info(0)['img_path']).resolve()
    except InputError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', default=str(QUICKSTART[0]))
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--port', type=int, default=7860)
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()
    if args.checkpoint is None:
        if args.config != str(QUICKSTART[0]):
            raise InputError(f'CHECKPOINT: wanted the weights of {args.config}, got none')
        if not QUICKSTART[1].is_file():
            raise InputError(
                f'CHECKPOINT: wanted {QUICKSTART[1]}, which is not there: tools/quickstart.sh makes it in about 6 '
                'minutes. Or name a CONFIG and a CHECKPOINT'
            )
        args.checkpoint = str(QUICKSTART[1])

    config = load_config(args.config)
    explorer = Explorer(load_model(config, args.checkpoint, args.device), FileReader(config))
    logging.getLogger('werkzeug').setLevel(logging.WARNING)  # not a line for each look
    server = make_server('127.0.0.1', args.port, make_app(explorer, args.config, find_example(config)), threaded=True)
    print(f'http://127.0.0.1:{server.server_port} shows {args.config}; Ctrl+C ends it', flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == '__main__':
    with one_line_errors():
        main()
