"""A 3 × 3 convolution as matrix products, closed under differentiation and `vmap`.

The convolution C(x, w) is bilinear. With X(g, w), its derivative's adjoint towards x, and
W(x, g), the one towards w, every derivative of the three is one of the three again:

    C(x, w):  x̄ = X(c̄, w),   w̄ = W(x, c̄)
    X(g, w):  ḡ = C(x̄, w),   w̄ = W(x̄, g)
    W(x, g):  x̄ = X(g, w̄),   ḡ = C(x, w̄)

so that gradients of any order are exact, cost a matrix product each and need no stored
patches. With a task axis, tasks that share their weights are just more images of one
convolution. For tasks with weights of their own there are two ways, chosen by shape: few
rows a task are batched products of gathered patches; many, on a CPU, are the groups of one
convolution of oneDNN's, which gathers nothing. Images are channels-last, so that the pixels
of a window's row lie side by side. Those of groups have, in memory, the tasks between pixels and
channels, [n, height, width, tasks, channels], while the order of their axes is that of all others:
passes over elements keep either and cost about the same. (The grouped convolution that `vmap` makes of
`conv2d`, with tasks and channels before the pixels, is slower than either way.)
"""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """3 × 3 convolution with one pixel of zero padding.

    x: [n, height, width, in]; weight: [3, 3, in, out]; returns [n, ⌈height/stride⌉, ⌈width/stride⌉, out].
    """
    out: Tensor = _Convolution.apply(x, weight, stride)
    return out


def patches(x: Tensor, stride: int = 1) -> Tensor:
    """The windows that `convolve` multiplies, [n, rows, columns, 9 · channels], of x [n, height, width, channels]."""
    out: Tensor = _Gather.apply(x, stride)
    return out


def _gather(x: Tensor, stride: int) -> Tensor:
    """Patches [n, rows, columns, 9 · channels] of images [n, height, width, channels]."""
    n, height, width, channels = x.shape
    rows, columns = _positions(height, stride), _positions(width, stride)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    image, row, column, _ = padded.stride()
    # A view: each window's rows of three pixels, which lie side by side; then one copy.
    windows = padded.as_strided((n, rows, columns, 3, 3 * channels), (image, stride * row, stride * column, row, 1))
    return windows.contiguous().view(n, rows, columns, 9 * channels)


def _scatter(patches: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The adjoint of `_gather`: every patch added back to where it was taken."""
    n, rows, columns, depth = patches.shape
    patches = patches.view(n, rows, columns, 3, 3, depth // 9)
    out = patches.new_empty(n, height, width, depth // 9)
    # Taps 1 … stride along each axis touch every pixel once: they begin the sum, the others are added.
    for i in (1, 2, 0):
        from_rows, to_rows = _touched(i, rows, height, stride)
        for j in (1, 2, 0):
            from_columns, to_columns = _touched(j, columns, width, stride)
            part, pixels = patches[:, from_rows, from_columns, i, j], out[:, to_rows, to_columns]
            if 1 <= i <= stride and 1 <= j <= stride:
                pixels.copy_(part)
            else:
                pixels.add_(part)
    return out


def _touched(tap: int, positions: int, size: int, stride: int) -> tuple[slice, slice]:
    """Positions whose tap 0, 1 or 2 lies inside the image, and the pixels it lies on."""
    first, end = int(tap == 0), min(positions, (size - tap) // stride + 1)
    return slice(first, end), slice(stride * first + tap - 1, max(0, stride * (end - 1) + tap), stride)


def _positions(size: int, stride: int) -> int:
    """Positions of a 3-wide window along `size` pixels with one pixel of padding."""
    return (size - 1) // stride + 1


# Each function below takes its arguments either without a task axis, images [n, …] and
# weights [3, 3, …], or with one in front of both.


def _patches(x: Tensor, stride: int) -> Tensor:
    """[…, n · positions, 9 · channels], contiguous."""
    gathered = _gather(x.flatten(0, -4), stride)
    return gathered.view(*x.shape[:-4], -1, gathered.shape[-1])


def _both_with_tasks(a: Tensor, in_a: int | None, b: Tensor, in_b: int | None, size: int) -> tuple[Tensor, Tensor]:
    """Both arguments with one task axis in front, merged with the one they may have."""
    a = a.movedim(in_a, 0) if in_a is not None else a.expand(size, *a.shape)
    b = b.movedim(in_b, 0) if in_b is not None else b.expand(size, *b.shape)
    return (a.flatten(0, 1), b.flatten(0, 1)) if a.ndim > 5 else (a, b)


MANY_ROWS = 240
"""From so many positions of all images that share a weight on, a CPU convolves by oneDNN."""

MANY_POSITIONS = 9
"""The same of one image where tasks have weights of their own."""

TASKS_OF_W, LARGE_IMAGE = 8, 100
"""W of tasks with weights of their own is one convolution of so many tasks at most, where an image has so many
positions or more: of 16, whose pixels lie 4096 bytes apart, it took a fifth longer and more."""


class Windows:
    """Images [n, height, width, in] or [tasks, n, height, width, in] under a stride; gathered and grouped once,
    if at all."""

    def __init__(self, x: Tensor, stride: int) -> None:
        self.x, self.stride = x, stride
        self.rows, self.columns = _positions(x.shape[-3], stride), _positions(x.shape[-2], stride)
        self._gathered: Tensor | None = None
        self._grouped: Tensor | None = None

    @property
    def gathered(self) -> Tensor:
        """[…, n · positions, 9 · in]."""
        if self._gathered is None:
            self._gathered = _patches(self.x, self.stride)
        return self._gathered

    def nchw(self, groups: int) -> Tensor:
        """As a convolution takes them that has a group for each task, or one for all."""
        if groups == 1:
            return _nchw(self.x, 1)
        if self._grouped is None:
            self._grouped = _nchw(self.x, groups)
        return self._grouped


def forwards(windows: Windows, weight: Tensor) -> Tensor:
    """C(x, w). weight: [3, 3, in, out], of all tasks, or [tasks, 3, 3, in, out]; nothing is recorded for autograd."""
    x, stride, groups = windows.x, windows.stride, _groups(weight)
    shape = (*x.shape[:-3], windows.rows, windows.columns, weight.shape[-1])
    if not _by_library(shape, weight):
        return product(windows.gathered, weight.flatten(-4, -2)).view(shape)
    found = F.conv2d(windows.nchw(groups), _oihw(weight), stride=stride, padding=1, groups=groups)
    return _nhwc(found.to(x.dtype), groups, shape)


def to_images(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """X(g, w), likewise."""
    shape, groups = (*grad.shape[:-3], height, width, weight.shape[-2]), _groups(weight)
    if not _by_library(grad.shape, weight):
        flat = grad.reshape(*grad.shape[:-4], -1, grad.shape[-1])
        taken = product(flat, weight.flatten(-4, -2).mT)
        taken = taken.view(-1, *grad.shape[-3:-1], taken.shape[-1])
        return _scatter(taken, height, width, stride).view(shape)
    grad = _nchw(grad, groups)
    some = grad.new_empty(len(grad), height, width, groups * shape[-1]).permute(0, 3, 1, 2)
    return _nhwc(_backwards(grad, some, _oihw(weight), stride, groups, [True, False, False])[0], groups, shape)


def to_weight(windows: Windows, grad: Tensor, together: bool = False) -> Tensor:
    """W(x, g), of each task, or summed over them: `together`; as `laid_out` lays a weight out."""
    x, stride = windows.x, windows.stride
    own = () if together else x.shape[:-4]
    some = x.new_empty(*own, grad.shape[-1], 3, 3, x.shape[-1]).movedim(-4, -1)
    if not _by_library(grad.shape, some):
        gathered, flat = windows.gathered, grad.reshape(*grad.shape[:-4], -1, grad.shape[-1])
        if together:
            gathered, flat = gathered.flatten(0, -2), flat.flatten(0, -2)
        weight = product(flat.mT, gathered)
        return weight.view(*weight.shape[:-1], 3, 3, x.shape[-1]).movedim(-4, -1)
    groups = _groups(some)
    if groups > TASKS_OF_W and math.prod(grad.shape[-3:-1]) >= LARGE_IMAGE:
        some_tasks = [slice(first, first + TASKS_OF_W) for first in range(0, groups, TASKS_OF_W)]
        each = [to_weight(Windows(x[tasks], stride), grad[tasks]) for tasks in some_tasks]
        return torch.cat([weight.movedim(-1, -4) for weight in each]).movedim(-4, -1)
    found = _backwards(_nchw(grad, groups), windows.nchw(groups), _oihw(some), stride, groups, [False, True, False])[1]
    return found.permute(0, 2, 3, 1).reshape(*own, -1, *found.shape[2:], x.shape[-1]).movedim(-4, -1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of a, also where the factors are rounded on the way (`engine.precision`)."""
    return (a @ b).to(a.dtype)


def laid_out(weight: Tensor) -> Tensor:
    """The same [3, 3, in, out] with out the slowest axis in memory, which oneDNN reads and writes as it is."""
    return weight.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def summed(weight: Tensor) -> Tensor:
    """Over the tasks, of [tasks, 3, 3, in, out] so laid out, in the order of memory."""
    return weight.movedim(-1, 1).sum(0).movedim(0, -1)


def _groups(weight: Tensor) -> int:
    """One for each task that has a weight of its own, or one for all images."""
    return 1 if weight.ndim == 4 else len(weight)


def _by_library(shape: tuple[int, ...], weight: Tensor) -> bool:
    """Whether oneDNN is the faster of the two; shape: of the convolution's outputs."""
    if weight.device.type != "cpu":
        return False
    if _groups(weight) == 1:
        return math.prod(shape[:-1]) >= MANY_ROWS
    return math.prod(shape[-3:-1]) >= MANY_POSITIONS


def _nchw(x: Tensor, groups: int) -> Tensor:
    """[images, groups · channels, height, width] of […, n, height, width, channels], channels last in memory."""
    together = x.flatten(0, -4) if groups == 1 else x.permute(1, 2, 3, 0, 4).flatten(3)
    return together.permute(0, 3, 1, 2)


def _nhwc(found: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """Back, to […, n, height, width, channels]."""
    found = found.permute(0, 2, 3, 1).contiguous()
    return found.view(shape) if groups == 1 else found.view(*found.shape[:3], groups, -1).permute(3, 0, 1, 2, 4)


def _oihw(weight: Tensor) -> Tensor:
    """[groups · out, in, 3, 3]."""
    return weight.movedim(-1, -4).flatten(0, -4).permute(0, 3, 1, 2)


def _backwards(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, groups: int, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """conv2d's derivatives; only the shape and layout of what has its own derivative taken are read."""
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, wanted
    )
    return found


class _Convolution(torch.autograd.Function):
    """C(x, w)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:  # type: ignore[override]
        return forwards(Windows(x, stride), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, ctx.stride = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        to_x, to_weight, _ = ctx.needs_input_grad
        return (
            _ToImages.apply(grad, weight, x.shape[-3], x.shape[-2], ctx.stride) if to_x else None,
            _ToWeight.apply(x, grad, ctx.stride) if to_weight else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, int]:
        if in_dims[1] is None and weight.ndim == 4 and in_dims[0] is not None:
            images = x.movedim(in_dims[0], 0)
            return _Convolution.apply(images.flatten(0, 1), weight, stride).unflatten(0, images.shape[:2]), 0
        x, weight = _both_with_tasks(x, in_dims[0], weight, in_dims[1], info.batch_size)
        return _split_tasks(_Convolution.apply(x, weight, stride), info.batch_size), 0


class _ToImages(torch.autograd.Function):
    """X(g, w)."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:  # type: ignore[override]
        return to_images(grad, weight, height, width, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, weight, _, _, ctx.stride = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, weight = ctx.saved_tensors
        to_grad, to_weight = ctx.needs_input_grad[:2]
        return (
            _Convolution.apply(towards, weight, ctx.stride) if to_grad else None,
            _ToWeight.apply(towards, grad, ctx.stride) if to_weight else None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, weight: Tensor, height: int, width: int, stride: int
    ) -> tuple[Tensor, int]:
        if in_dims[1] is None and weight.ndim == 4 and in_dims[0] is not None:
            images = grad.movedim(in_dims[0], 0)
            out = _ToImages.apply(images.flatten(0, 1), weight, height, width, stride)
            return out.unflatten(0, images.shape[:2]), 0
        grad, weight = _both_with_tasks(grad, in_dims[0], weight, in_dims[1], info.batch_size)
        return _split_tasks(_ToImages.apply(grad, weight, height, width, stride), info.batch_size), 0


class _ToWeight(torch.autograd.Function):
    """W(x, g): summed over the images, not over tasks."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, stride: int) -> Tensor:  # type: ignore[override]
        return to_weight(Windows(x, stride), grad).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, grad, ctx.stride = inputs
        ctx.save_for_backward(x, grad)

    @staticmethod
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, grad = ctx.saved_tensors
        to_x, to_grad, _ = ctx.needs_input_grad
        return (
            _ToImages.apply(grad, towards, x.shape[-3], x.shape[-2], ctx.stride) if to_x else None,
            _Convolution.apply(x, towards, ctx.stride) if to_grad else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, grad: Tensor, stride: int) -> tuple[Tensor, int]:
        x, grad = _both_with_tasks(x, in_dims[0], grad, in_dims[1], info.batch_size)
        return _split_tasks(_ToWeight.apply(x, grad, stride), info.batch_size), 0


class _Gather(torch.autograd.Function):
    """Patches [n, rows, columns, 9 · channels]; linear, with `_Scatter` as its adjoint."""

    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:  # type: ignore[override]
        return _gather(x, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.stride = inputs
        ctx.size = x.shape[1:3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Scatter.apply(grad, *ctx.size, ctx.stride), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, stride: int) -> tuple[Tensor, int]:
        images = x.movedim(in_dims[0], 0)
        return _Gather.apply(images.flatten(0, 1), stride).unflatten(0, images.shape[:2]), 0


class _Scatter(torch.autograd.Function):
    """The adjoint of `_Gather`, which is its own adjoint's."""

    @staticmethod
    def forward(grad: Tensor, height: int, width: int, stride: int) -> Tensor:  # type: ignore[override]
        return _scatter(grad, height, width, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.stride = inputs[3]

    @staticmethod
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Gather.apply(towards, ctx.stride), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None, None], grad: Tensor, height: int, width: int, stride: int
    ) -> tuple[Tensor, int]:
        images = grad.movedim(in_dims[0], 0)
        return _Scatter.apply(images.flatten(0, 1), height, width, stride).unflatten(0, images.shape[:2]), 0


def _split_tasks(out: Tensor, size: int) -> Tensor:
    """The task axis of this `vmap` apart from the one that was there before."""
    return out if out.shape[0] == size else out.view(size, -1, *out.shape[1:])


for _function in (_Convolution, _ToImages, _ToWeight, _Gather, _Scatter):
    # torch looks the signature up at every call; found here, it is not put together anew each time.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined, union-attr]
