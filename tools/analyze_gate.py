"""Says how a trained gate decides over the test set: tokens of an image, and which regions become coarse.

    python tools/analyze_gate.py CONFIG CHECKPOINT --out gate.json

Images go through the config's test pipeline and, in one piece, through the model.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.apis import init_model
from mmseg.registry import DATASETS
from rich.progress import track

from mmseg_msvit.inspection import coarse_by_purity, find_msvit, record_tokens


def analyze(model, dataset) -> dict:
    """Runs the model over the data set.

    Returns:
        ``images``; ``tokens``, the mean of an image without cls token, with the standard deviation ``tokens_std``;
        ``dense_tokens``; ``coarse``, the share of coarse regions, and among uniform and mixed ones
        ``coarse_of_uniform`` and ``coarse_of_mixed``; ``conditionality``, the standard deviation of the decision
        between images at one place of the region grid, mean over places: 0 is a static mask.
    """
    region = find_msvit(model).region
    counts, tokens_of, dense, maps = Counter(), [], [], []
    for i in track(range(len(dataset)), 'images'):
        data = pseudo_collate([dataset[i]])
        with record_tokens(model) as seen, torch.no_grad():
            (sample,) = model.test_step(data)
        (tokens,) = seen
        size = sample.img_shape[:2]  # what the pipeline made of the image; the truth keeps its own size
        labels = F.interpolate(sample.gt_sem_seg.data[None].float(), size=size, mode='nearest')[0].long()
        counts.update(coarse_by_purity(tokens, labels.to(tokens.coarse.device), region))
        tokens_of.append(int(tokens.active_counts()) - int(tokens.with_cls))
        dense.append(tokens.grid[0] * tokens.grid[1])
        maps.append(tokens.coarse[0].float().cpu())
    same = [m for m in maps if m.shape == maps[0].shape]
    return dict(
        images=len(dataset),
        tokens=float(np.mean(tokens_of)),
        tokens_std=float(np.std(tokens_of)),
        dense_tokens=float(np.mean(dense)),
        coarse=float(np.mean([m.mean() for m in maps])),
        coarse_of_uniform=counts['uniform_coarse'] / max(counts['uniform'], 1),
        coarse_of_mixed=counts['mixed_coarse'] / max(counts['mixed'], 1),
        conditionality=float(torch.stack(same).std(0, correction=0).mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()

    config = Config.fromfile(args.config)
    config.model.test_cfg = dict(mode='whole')
    model = init_model(config, args.checkpoint, device=args.device)
    numbers = analyze(model, DATASETS.build(config.test_dataloader.dataset))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(numbers, indent=2) + '\n')
    print(
        f'tokens of an image    {numbers["tokens"]:.1f} +- {numbers["tokens_std"]:.1f} of {numbers["dense_tokens"]:.0f}'
    )
    print(f'coarse regions        {numbers["coarse"]:.1%}')
    print(f'  of uniform regions  {numbers["coarse_of_uniform"]:.1%}')
    print(f'  of mixed regions    {numbers["coarse_of_mixed"]:.1%}')
    print(f'conditionality        {numbers["conditionality"]:.2f} (0: a static mask; 0.5: half of the images differ)')


if __name__ == '__main__':
    main()
