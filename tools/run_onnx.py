"""Runs a file of tools/export_onnx.py over images and draws what it sees. Needs onnxruntime, numpy, OpenCV and rich.

    python tools/run_onnx.py MODEL.onnx FOLDER --out pictures [--threshold 0.5]

One PNG for each image: its classes in colour over it. How images are read, what the classes are and their colours come
from the file alone, so that it and this script can go where there is no torch. An image that cannot be read is reported
at the end.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from rich.progress import track

NOTES = (
    'classes', 'palette', 'mean', 'std', 'bgr_to_rgb', 'size_divisor', 'pad_val', 'resize', 'threshold', 'token_budget',
    'binary_threshold',
)  # fmt: skip
# What OpenCV reads.
SUFFIXES = (
    '.jpg', '.jpeg', '.jpe', '.jp2', '.png', '.bmp', '.dib', '.webp', '.avif', '.gif', '.tif', '.tiff', '.exr', '.hdr',
    '.pbm', '.pgm', '.ppm', '.pnm', '.ras',
)  # fmt: skip
COLOURS = dict(color=cv2.IMREAD_COLOR, grayscale=cv2.IMREAD_GRAYSCALE, unchanged=cv2.IMREAD_UNCHANGED)


def load(path):
    """A session and the file's metadata."""
    if not path.is_file():
        raise SystemExit(f'MODEL.onnx: wanted a file, got {path}, which is not there')
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:  # ONNX Runtime has many
        raise SystemExit(f'MODEL.onnx: wanted an ONNX file, got {path}: {str(error).splitlines()[0]}') from None
    notes = session.get_modelmeta().custom_metadata_map
    if not set(NOTES) <= set(notes) or session.get_outputs()[-1].name != 'tokens_used':
        raise SystemExit(f'MODEL.onnx: wanted a file of tools/export_onnx.py, got {path} without its metadata')
    found = {name: json.loads(notes[name]) for name in NOTES}
    # Of a file from before it was written there, it was this.
    return session, {**found, 'read': json.loads(notes.get('read', '{"color": "color", "backend": "cv2"}'))}


def choose_knob(session, notes, threshold, tokens):
    """The second input, by its name."""
    name = session.get_inputs()[1].name
    given = dict(threshold=threshold, tokens=tokens)
    other = 'tokens' if name == 'threshold' else 'threshold'
    if given[other] is not None:
        raise SystemExit(f'--{other}: the file has an input of {name} in its place')
    value = given[name] if given[name] is not None else notes['threshold' if name == 'threshold' else 'token_budget']
    if value is None:
        raise SystemExit('--tokens: wanted the mean number of tokens that an image may have, got none')
    return {name: np.array(value, np.float32)}


def read(path, notes):
    """An image file as the config's pipeline reads it, (H, W, C); None where it cannot be read."""
    if notes['read']['backend'] == 'tifffile':
        import tifffile  # for more bands than four

        try:
            picture = tifffile.imread(path)
        except Exception:  # tifffile's codecs have many
            return None
    else:
        picture = cv2.imread(str(path), COLOURS[notes['read']['color']])
    return picture[..., None] if picture is not None and picture.ndim == 2 else picture


def shown(picture):
    """An image (H, W, C) of any dtype as (H, W, 3) uint8: what has not 8 bits is stretched, bands after 3 left out."""
    bands = picture[..., :3] if picture.shape[2] >= 3 else picture[..., :1].repeat(3, 2)
    if bands.dtype != np.uint8:
        low, high = float(bands.min()), float(bands.max())
        bands = ((bands - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return np.ascontiguousarray(bands)


def prepare(picture, notes):
    """(H, W, C) in BGR to (1, C, H', W') as the model wants it, and the size without padding."""
    for step in notes['resize']:
        height, width = picture.shape[:2]
        if 'multiple' in step:
            height, width = (-(-n // step['multiple']) * step['multiple'] for n in (height, width))
        elif step['keep_ratio']:
            long, short = max(step['scale']), min(step['scale'])
            factor = min(long / max(height, width), short / min(height, width))
            height, width = (int(n * factor + 0.5) for n in (height, width))
        else:
            width, height = step['scale']
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
        picture = picture[..., None] if picture.ndim == 2 else picture
    size = picture.shape[:2]
    pixels = picture[..., ::-1] if notes['bgr_to_rgb'] and picture.shape[2] == 3 else picture
    pixels = (pixels - np.array(notes['mean'], np.float32)) / np.array(notes['std'], np.float32)
    after = [(0, -n % notes['size_divisor']) for n in size]
    pixels = np.pad(pixels, (*after, (0, 0)), constant_values=notes['pad_val'])
    return pixels.transpose(2, 0, 1)[None].astype(np.float32), size


def predict(session, knob, picture, notes):
    """Class ids (H, W) uint8 of a picture, at its own size, and the number of its tokens."""
    image, (height, width) = prepare(picture, notes)
    answer, tokens = session.run(None, {'image': image, **knob})
    answer, size = answer[0, ..., :height, :width], picture.shape[1::-1]
    if answer.dtype == np.uint8:
        return cv2.resize(answer, size, interpolation=cv2.INTER_NEAREST), int(tokens[0])
    logits = np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR) for plane in answer])
    if len(logits) > 1:
        return logits.argmax(0).astype(np.uint8), int(tokens[0])
    classes = 1 / (1 + np.exp(-logits[0])) > notes['binary_threshold']
    return classes.astype(np.uint8), int(tokens[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', type=Path, metavar='MODEL.onnx')
    parser.add_argument('folder', type=Path, help='a folder of images, or an image')
    parser.add_argument('--out', type=Path, default=Path('pictures'), help='folder for the pictures')
    parser.add_argument('--threshold', type=float, help="of the gate; the config's without it. More of it, more tokens")
    parser.add_argument('--tokens', type=float, help='the tokens that an image may have; for a file made with --budget')
    args = parser.parse_args()

    if not args.folder.exists():
        raise SystemExit(f'FOLDER: wanted an image or a folder of images, got {args.folder}, which is not there')
    inside = args.folder.iterdir() if args.folder.is_dir() else [args.folder]
    paths = sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f'FOLDER: wanted {", ".join(SUFFIXES)} files, got {args.folder} without any')
    session, notes = load(args.model)
    knob = choose_knob(session, notes, args.threshold, args.tokens)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(notes['palette'])] = notes['palette']
    args.out.mkdir(parents=True, exist_ok=True)
    lines, skipped = [], []
    for path in track(paths, 'pictures'):
        picture = read(path, notes)
        if picture is None:
            skipped.append(f'image: wanted a picture, got {path}, which cannot be read')
            continue
        if picture.shape[2] != len(notes['mean']) or not np.isfinite(picture).all():
            skipped.append(f'image: wanted {len(notes["mean"])} bands of finite numbers, got others in {path}')
            continue
        try:
            classes, tokens = predict(session, knob, picture, notes)
        except Exception as error:  # ONNX Runtime has many
            skipped.append(f'image: wanted one that the file can run, got {path}: {str(error).splitlines()[0]}')
            continue
        overlay = cv2.addWeighted(shown(picture), 0.5, palette[classes][..., ::-1], 0.5, 0)
        cv2.imwrite(str(args.out / f'{path.name}.png'), overlay)
        shares = np.bincount(classes.flatten(), minlength=len(notes['classes'])) / classes.size
        most = ', '.join(f'{notes["classes"][i]} {shares[i]:.0%}' for i in shares.argsort()[::-1][:3] if shares[i])
        lines.append(f'{path.name}: {tokens} tokens; {most}')
    print('\n'.join(lines))
    print(f'{len(lines)} pictures in {args.out}')
    if skipped:
        raise SystemExit('\n'.join(skipped))


if __name__ == '__main__':
    main()
