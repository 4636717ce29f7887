"""Shows how a trained gate decides over the test set, as one HTML page and as numbers.

    python tools/analyze_gate.py CONFIG CHECKPOINT --out gate.json --html gate.html

Tokens of an image; which regions become coarse, by class, by purity and by place; how well coarse and fine cells are
classified; whether images differ or the gate is a static mask; the images with the most and the fewest tokens. Images
go through the config's test pipeline and, in one piece, through the model.
"""

import argparse
from pathlib import Path

from mmseg_msvit.tooling.command_line import DEVICE, one_line_errors, write_json
from mmseg_msvit.tooling.gate_report import Analysis, page
from mmseg_msvit.tooling.models import load_config, load_model
from mmseg_msvit.tooling.testset import iou_options, load_testset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    parser.add_argument('--html', type=Path, help='HTML file for the page; nothing else is needed to show it')
    parser.add_argument('--device', default=DEVICE)
    args = parser.parse_args()

    config = load_config(args.config)
    dataset = load_testset(config)
    analysis = Analysis(load_model(config, args.checkpoint, args.device), dataset, iou_options(config)['ignore_index'])
    numbers = analysis.numbers()
    if args.out:
        write_json(args.out, numbers)
    if args.html:
        template = (Path(__file__).parent / 'gate_report.html').read_text()
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page(analysis, numbers, template, args.config, args.checkpoint))

    def percent(value):
        return 'no such cells' if value is None else f'{value:.1%}'

    print(
        f'tokens of an image    {numbers["tokens"]:.1f} +- {numbers["tokens_std"]:.1f} of {numbers["dense_tokens"]:.0f}'
    )
    print(f'coarse regions        {numbers["coarse"]:.1%}')
    print(f'  of uniform regions  {numbers["coarse_of_uniform"]:.1%}')
    print(f'  of mixed regions    {numbers["coarse_of_mixed"]:.1%}')
    print(f'pixels right, coarse  {percent(numbers["accuracy_coarse"])}')
    print(f'pixels right, fine    {percent(numbers["accuracy_fine"])}')
    images = numbers['place']['images']
    of = '' if images == numbers['images'] else f', over {images} images of one size'
    spread = f'{numbers["conditionality"]:.2f}'
    print(f'conditionality        {spread} (0: a static mask; 0.5: half of the images differ){of}')


if __name__ == '__main__':
    with one_line_errors():
        main()
