"""Files of tools/export_onnx.py against the model that they are of, over its test set: mIoU, agreement, time.

    python tools/compare_onnx.py CONFIG CHECKPOINT MODEL.onnx INT8.onnx [--threads 2] [--limit 50]

Files need logits and a threshold, which is the config's. The model in torch, the dense ViT of its blocks and the files
take turns on each image, between mmseg's own reading and resizing, so that ratios of their times hold. Agreement is the
share of pixels of the class that the model in torch gives them.
"""

import argparse
import statistics
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from rich.progress import track

from mmseg_msvit.measuring.inspection import check_one_pass
from mmseg_msvit.tooling.baselines import dense_forward
from mmseg_msvit.tooling.command_line import InputError, about, one_line_errors, positive, print_table
from mmseg_msvit.tooling.dense_pass import evenly
from mmseg_msvit.tooling.exported import through_file
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import image_path, iou_metric, load_testset, read_image
from mmseg_msvit.tooling.timing import paired_ratios, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('files', nargs='+', type=Path, metavar='MODEL.onnx')
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads(), help='of torch and ONNX Runtime')
    parser.add_argument('--limit', type=positive, help='so many images, evenly spread')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    config = load_config(args.config)
    dataset = load_testset(config)
    model = load_model(config, args.checkpoint, 'cpu')
    budget = model.backbone.select.token_budget
    if budget is not None:
        raise InputError(
            f'CONFIG: wanted token_budget=None, since files are run with a threshold, got {budget} in {args.config}'
        )
    MMLogger.get_instance('compare', log_level='WARNING')  # else IoUMetric prints a table for each

    def with_backbone(backbone, inputs):
        features = backbone(inputs)
        features = model.neck(features) if model.with_neck else features
        return model.decode_head.predict(features, [dict(img_shape=inputs.shape[2:])], model.test_cfg)

    def at_threshold(function):
        return lambda inputs: function(inputs, model.backbone.select.threshold)

    functions = {
        'torch': partial(with_backbone, model.backbone),
        'torch, dense': partial(with_backbone, partial(dense_forward, model.backbone)),
        **{str(path): at_threshold(through_file(path, args.threads)) for path in args.files},
    }
    seconds = {name: [] for name in functions}
    agreement = {name: [] for name in functions}
    metrics = {name: iou_metric(config, dataset) for name in functions}
    chosen = evenly(range(len(dataset)), args.limit or len(dataset))
    for turn, i in enumerate(track([chosen[0], *chosen], 'images')):  # the first once more, to warm up
        with about(image_path(dataset, i)):
            if not turn:
                check_one_pass(model, read_image(dataset, i))
            data, truth = pseudo_collate([read_image(dataset, i)]), None
            for name, function in functions.items():
                spent = []

                def encode_decode(inputs, metas, function=function, spent=spent):
                    second, logits = timed(function, inputs, inputs.device)
                    spent.append(second)
                    return logits

                model.encode_decode = encode_decode
                with torch.no_grad():
                    (sample,) = model.test_step(deepcopy(data))
                classes = sample.pred_sem_seg.data
                truth = classes if truth is None else truth
                if turn:
                    agreement[name].append((classes == truth).float().mean().item())
                    seconds[name].append(sum(spent))
                    metrics[name].process(data, [sample.to_dict()])

    rows = []
    for name, metric in metrics.items():
        ratio, low, high = paired_ratios(seconds[name], seconds['torch, dense'])
        rows.append([
            name, f'{metric.compute_metrics(metric.results)["mIoU"]:.2f}', f'{statistics.fmean(agreement[name]):.4%}',
            f'{1000 * statistics.median(seconds[name]):.0f}', f'{ratio:.2f}', f'{low:.2f}-{high:.2f}',
        ])  # fmt: skip
    columns = ['mIoU', 'agreement', 'ms', 'x dense', '(quartiles)']
    print_table(f'{len(chosen)} images, {args.threads} threads', columns, rows)


if __name__ == '__main__':
    with one_line_errors():
        main()
