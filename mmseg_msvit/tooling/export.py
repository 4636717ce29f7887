"""A segmentor as one ONNX graph: image in, logits or class map out, the gate and its tokens inside.

The graph is a trace of the model's own forward pass by :func:`torch.export.export`, in which batch, height, width and
the number of each image's tokens stay open. See ``tools/export_onnx.py``.
"""

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Dict, List, Tuple

import onnx
import torch
from mmcv.transforms import LoadAnnotations, LoadImageFromFile, Resize
from mmengine.config import Config
from mmseg.datasets.transforms import PackSegInputs, ResizeToMultiple
from onnxscript import opset20 as ops
from torch import Tensor, nn

from .. import __version__
from ..gates.from_outside import deciding_by, evaluating, find_msvit
from ..labels import last_head
from ..measuring.inspection import record_tokens, refuse_passes
from ..tokens.embedding import mean_weights
from .command_line import InputError, first_line
from .testset import FileReader

# The first whose resizing knows all that torch's does is 18, whose pooling is right at a ragged edge 19.
OPSET = 20


class Deployed(nn.Module):
    """What the file computes, as a module of two tensors.

    Args:
        model: a segmentor, see :func:`evaluating`.
        budget: whether the second input is :class:`TokenSelector`'s ``token_budget``, in the place of its threshold.
        classes: whether the first output is a class map, in the place of logits.
    """

    def __init__(self, model: nn.Module, budget: bool, classes: bool):
        super().__init__()
        self.model = model
        self.budget = budget
        self.classes = classes

    def forward(self, image: Tensor, knob: Tensor) -> Tuple[Tensor, Tensor]:
        """(B, C, H, W) normalised, and () float32, to (B, K, H, W) or (B, H, W) uint8, and tokens (B,) int64."""
        threshold, budget = (0.5, knob) if self.budget else (knob, None)
        with deciding_by(self.model, threshold, budget), record_tokens(self.model) as seen:
            logits = self.model.encode_decode(image, [dict(img_shape=image.shape[2:])])
        refuse_passes(self.model, len(seen))
        ((tokens, _),) = seen
        return self._class_map(logits) if self.classes else logits, tokens.active_counts()

    def _class_map(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:  # two classes by one logit
            return (logits[:, 0].sigmoid() > last_head(self.model.decode_head).threshold).to(torch.uint8)
        return logits.argmax(1).to(torch.uint8)


class AveragePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` by matrix products, which know their weights only when the size is known.

    Args:
        size: windows along both sides.
    """

    def __init__(self, size: Tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (mean_weights(cells, windows, x) for cells, windows in zip(x.shape[2:], self.size))
        return rows @ x @ columns.T


def export_onnx(model: nn.Module, budget: bool = False, classes: bool = False) -> torch.onnx.ONNXProgram:
    """The graph of a segmentor, by :class:`Deployed`.

    Args:
        model: with a backbone over tokens of several scales, on the CPU in float32; it stays as it is.
        budget: whether its second input is ``tokens``, in the place of ``threshold``.
        classes: whether its first output is ``classes``, in the place of ``logits``.

    Raises:
        InputError: a part of the model cannot be exported; the message names it.
    """
    if (model.test_cfg or {}).get('mode') == 'slide':
        raise InputError(
            "CONFIG: wanted inference of whole images, got test_cfg of mode 'slide': the graph sees an image in one "
            "piece. Export with model.test_cfg = dict(mode='whole')"
        )
    if classes and model.num_classes > 256:
        raise InputError(f'--classes: wanted at most 256 classes, which uint8 holds, got {model.num_classes}')
    deployed = Deployed(deepcopy(model), budget, classes).eval()
    for module in deployed.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                size = child.output_size
                setattr(module, name, AveragePool(size if isinstance(size, tuple) else (size, size)))
    backbone = find_msvit(deployed)
    region = backbone.scales[-1]
    # Nothing here is 1 or a whole number of regions: what holds of this image holds of others.
    height, width = (n * region + backbone.patch_size // 2 for n in (2, 3))
    mean = getattr(model.data_preprocessor, 'mean', None)
    channels = backbone.in_channels if mean is None or mean.numel() == 1 else mean.numel()
    example = torch.randn(2, channels, height, width), torch.tensor(20.0 if budget else 0.5)
    some = torch.export.Dim.DYNAMIC
    try:
        with evaluating(deployed.model):
            deployed(*example)  # what fails without a graph, too, fails in a moment
            program = torch.export.export(
                deployed,
                example,
                dynamic_shapes=({0: some, 2: some, 3: some}, None),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            return torch.onnx.export(
                program,
                input_names=['image', 'tokens' if budget else 'threshold'],
                output_names=['classes' if classes else 'logits', 'tokens_used'],
                opset_version=OPSET,
                custom_translation_table={torch.ops.aten.sort.stable: _sort},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever a part of the model does that a graph cannot
        raise InputError(f'CONFIG: {_culprit(error, deployed.model)} cannot be exported: {_reason(error)}') from error


def _sort(values, stable=True, dim=-1, descending=False):
    """A stable sort, which torch.onnx lacks, in ONNX: its TopK takes of equal values the first one first."""
    size = ops.Gather(ops.Shape(values), [dim])
    return ops.TopK(values, size, axis=dim, largest=int(descending), sorted=1)


def _culprit(error: BaseException, model: nn.Module) -> str:
    """The innermost part of the model in an error's traceback, by its name and type."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = model, error.__traceback__
    while trace is not None:
        inside = trace.tb_frame.f_locals.get('self')
        if isinstance(inside, nn.Module) and id(inside) in names:
            found = inside
        trace = trace.tb_next
    return f'{names[id(found)] or "the model"} ({type(found).__name__})'


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # torch.onnx puts its advice around it
        error = error.__cause__
    return first_line(error)


def metadata(model: nn.Module, config: Config) -> Dict[str, str]:
    """What one needs beside the graph to run it on files, each value in JSON.

    ``classes``, ``palette`` (RGB); ``read``, how a file is read, ``resize``, what the test pipeline does then;
    ``mean``, ``std`` of pixels as they are in the file, ``bgr_to_rgb``, whether they are for images in RGB;
    ``size_divisor``, to whose multiple images are padded with ``pad_val`` after that; ``patch``, ``scales``,
    ``prefix_tokens`` (cls token and registers); ``threshold`` and ``token_budget`` of the config; ``binary_threshold``
    of a head with one logit for two classes; ``versions``.

    Raises:
        InputError: the config prepares images in a way that these do not tell.
    """
    backbone, reader, pixels = find_msvit(model), FileReader(config), model.data_preprocessor
    channels, given = backbone.in_channels, config.model.get('data_preprocessor') or {}
    normalised = hasattr(pixels, 'mean')
    resize, read = [], dict(color='color', backend='cv2')
    for step in (step for step in reader.transforms if not isinstance(step, LoadAnnotations)):
        by_cv2 = getattr(step, 'imdecode_backend', getattr(step, 'backend', 'cv2')) == 'cv2'
        bilinear = getattr(step, 'interpolation', None) in (None, 'bilinear')
        if isinstance(step, Resize) and step.scale and by_cv2 and bilinear:
            resize.append(dict(scale=step.scale, keep_ratio=step.keep_ratio))
        elif isinstance(step, ResizeToMultiple) and bilinear:
            resize.append(dict(multiple=step.size_divisor))
        elif type(step) is LoadImageFromFile and _can_be_told(step):
            read = dict(color=step.color_type, backend=step.imdecode_backend)
        elif not isinstance(step, PackSegInputs):
            raise InputError(
                'CONFIG: wanted a test pipeline of LoadImageFromFile, by cv2 or tifffile, Resize to a scale and '
                'ResizeToMultiple, by cv2 and bilinear, which a file can tell of, got '
                f'{type(step).__name__} as it is set there'
            )
    if resize and model.align_corners:
        raise InputError(
            'CONFIG: wanted a head with align_corners=False where the test pipeline resizes images, got True: who '
            'runs the file enlarges its logits by the middles of pixels'
        )
    if (pixels.test_cfg or {}).get('size') is not None:
        raise InputError(
            f'CONFIG: wanted a data_preprocessor.test_cfg with size_divisor alone, got size={pixels.test_cfg["size"]}'
        )
    found = dict(
        classes=reader.classes.names,
        palette=reader.classes.palette,
        mean=_of_channels(pixels.mean, channels) if normalised else [0.0] * channels,
        std=_of_channels(pixels.std, channels) if normalised else [1.0] * channels,
        bgr_to_rgb=bool(given.get('bgr_to_rgb') or given.get('rgb_to_bgr')),
        size_divisor=(pixels.test_cfg or {}).get('size_divisor') or 1,
        pad_val=pixels.pad_val,
        resize=resize,
        read=read,
        patch=backbone.patch_size,
        scales=backbone.scales,
        prefix_tokens=backbone.select.prefix,
        threshold=backbone.select.threshold,
        token_budget=backbone.select.token_budget,
        binary_threshold=last_head(model.decode_head).threshold,
        versions=dict(mmseg_msvit=__version__, torch=torch.__version__),
    )
    return {name: json.dumps(value) for name, value in found.items()}


def _of_channels(values: torch.Tensor, channels: int) -> List[float]:
    """A value for each channel: a single one is that of all, as it is when images are normalised."""
    return (values.flatten().tolist() * channels)[: max(channels, values.numel())]


def _can_be_told(load: LoadImageFromFile) -> bool:
    return load.color_type in ('color', 'grayscale', 'unchanged') and load.imdecode_backend in ('cv2', 'tifffile')


def save_onnx(
    program: torch.onnx.ONNXProgram, path: Path, notes: Dict[str, str], int8: bool = False, fp16: bool = False
) -> None:
    """Writes a graph with its :func:`metadata` into a file, and beside it weights of more than 2 GB.

    Args:
        program: by :func:`export_onnx`.
        path: of the file.
        notes: the metadata.
        int8: whether linear layers of the backbone's blocks get weights in int8, and activations as they come. All
            else, the gate above all, stays in float32, and so the decision is the same.
        fp16: whether blocks, neck and heads are in float16, but for softmax and norms; all else stays, likewise.

    Raises:
        InputError: there is no such layer.
    """
    program.model.metadata_props.update(notes)
    if fp16:
        _save_half(program, path)
        return
    if not int8:
        program.save(path)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The quantiser makes a product and a sum of a Gemm, the product under this name; an empty list would mean all.
    linear = [f'{n.name}_MatMul' if n.op_type == 'Gemm' else n.name for n in program.model.graph if _is_of_block(n)]
    if not linear:
        raise InputError("--int8: wanted linear layers in the backbone's blocks, got none")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / 'float32.onnx'
        program.save(whole)
        quantize_dynamic(
            whole,
            path,
            nodes_to_quantize=linear,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # else sums overflow, unnoticed, on processors before VNNI
        )


def _save_half(program: torch.onnx.ONNXProgram, path: Path) -> None:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    whole = [node.name for node in program.model.graph if not _may_be_half(node)]
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / 'float32.onnx')
        model = onnx.load(Path(folder) / 'float32.onnx')
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, 'Softmax', 'LayerNormalization'],
        node_block_list=whole,
    )
    onnx.save(half, path)


def _may_be_half(node) -> bool:
    """Whether a node of the graph is of a block, the neck or a head, and not of what decides."""
    scopes = json.loads(node.metadata_props.get('pkg.torch.onnx.name_scopes', '[]').replace("'", '"'))
    parts = ('model.backbone.layers.', 'model.neck', 'model.decode_head')
    return any(scope.startswith(parts) for scope in scopes) and 'model.backbone.select' not in scopes


def _is_of_block(node) -> bool:
    """Whether a node of the graph multiplies by a weight of a block."""
    return node.op_type in ('MatMul', 'Gemm') and any(
        value is not None and value.is_initializer() and '.backbone.layers.' in f'.{value.name}'
        for value in node.inputs
    )
