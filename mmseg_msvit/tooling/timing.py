"""Time and memory of functions on one machine, measured so that they can be compared."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from rich.progress import track
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def timed(function: Callable, argument: Any, device: torch.device) -> Tuple[float, Any]:
    """Seconds of one call, the device's work included, and what it returns."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function(argument)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def in_turns(functions: Dict[str, Callable], batches: Sequence[Tensor], warm_up: Tensor) -> Dict[str, List[float]]:
    """Seconds of each function on each batch.

    Functions take turns, A B C A B C, so that a noisy machine disturbs all of them: compare them within a round. Each
    call begins with the same random numbers, so that all that toss coins toss the same ones.

    Args:
        functions: name -> function of a batch.
        batches: one a round.
        warm_up: the batch of a first round that does not count.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in functions}
    calls = [(name, batch) for batch in (warm_up, *batches) for name in functions]
    for i, (name, batch) in enumerate(track(calls, f'batch {len(warm_up)}', transient=True)):
        torch.manual_seed(0)
        spent, _ = timed(functions[name], batch, batch.device)
        if i >= len(functions):
            seconds[name].append(spent)
    return seconds


def paired_ratios(seconds: Sequence[float], reference: Sequence[float]) -> Tuple[float, float, float]:
    """Median, lower and upper quartile of the ratios within a round."""
    ratios = [a / b for a, b in zip(seconds, reference)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), low, high


def peak_memory(function: Callable, images: Tensor) -> float:
    """MiB that a call has in use at its peak beyond what was in use before."""
    if images.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(images)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function(images)
    with tempfile.NamedTemporaryFile(suffix='.json') as file:
        recorded.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())['traceEvents']
    used = peak = 0
    for event in sorted((e for e in events if e.get('name') == '[memory]'), key=lambda e: e['ts']):
        used += event['args']['Bytes']
        peak = max(peak, used)
    return peak / 2**20
