"""Writes a segmentor as one ONNX file, from the normalised image to the class map, for images of any size.

    python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx [--int8 | --fp16] [--budget] [--classes]

Inputs: ``image`` (B, 3, H, W) float32, normalised, and ``threshold`` () float32, above whose probability a region is
coarse; with --budget in its place ``tokens`` () float32, the mean number of tokens, cls token and registers among them,
that the images of a batch may have (``token_budget`` of the backbone). Outputs: ``logits`` (B, classes, H, W), with
--classes in their place ``classes`` (B, H, W) uint8, and ``tokens_used`` (B,) int64. The file's metadata say how images
are read: tools/run_onnx.py needs nothing else. --int8 keeps the weights of the blocks' linear layers in int8, --fp16
blocks and head in float16, for GPUs; the gate and its decision, softmax and norms stay in float32.

The graph sees an image in one piece, and numbers that are not finite pass through it. OpenVINO resizes positions and
images without antialiasing, whatever the graph says, and takes no image that is smaller than the coarsest region.

ONNX opset 20. Tested with torch 2.13, onnx 1.23, onnxscript 0.7, ONNX Runtime 1.32 and OpenVINO 2026.4. Needs
``pip install mmseg_msvit[export]``.
"""

import argparse
from pathlib import Path

import torch

from mmseg_msvit.tooling.command_line import InputError, one_line_errors
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.versions import BEFORE_TORCH_26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('out', type=Path, metavar='OUT.onnx')
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument('--int8', action='store_true', help="the blocks' linear layers in int8")
    smaller.add_argument('--fp16', action='store_true', help='blocks and head in float16, the gate in float32')
    parser.add_argument('--budget', action='store_true', help='an input of tokens in the place of the threshold')
    parser.add_argument('--classes', action='store_true', help='a class map out in the place of logits')
    args = parser.parse_args()

    if BEFORE_TORCH_26:
        raise InputError(f'wanted torch 2.6 or later, got {torch.__version__}')
    try:
        import onnxscript  # noqa: F401

        from mmseg_msvit.tooling.export import export_onnx, metadata, save_onnx
    except ImportError as error:
        raise InputError(f'wanted the packages of mmseg_msvit[export], got {error}') from error
    if not args.out.parent.is_dir():
        raise InputError(f'OUT.onnx: wanted a file in a folder, got {args.out}, whose folder is not there')
    config = load_config(args.config)
    model = load_model(config, args.checkpoint, 'cpu')
    notes = metadata(model, config)
    if model.backbone.select.token_budget is not None and not args.budget:
        raise InputError('--budget: wanted it, since the config has a token_budget, which a threshold would not keep')
    if args.int8 and model.backbone.gate.blocks:
        gate = type(model.backbone.gate).__name__
        raise InputError(
            f'--int8: wanted a gate that sees pixels, got {gate}: it looks through the blocks and would change'
        )
    save_onnx(export_onnx(model, args.budget, args.classes), args.out, notes, args.int8, args.fp16)
    print(f'{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB')


if __name__ == '__main__':
    with one_line_errors():
        main()
