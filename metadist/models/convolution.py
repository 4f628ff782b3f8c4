"""A 3 × 3 convolution as matrix products, closed under differentiation and `vmap`.

The convolution C(x, w) is bilinear. With X(g, w), its derivative's adjoint towards x, and
W(x, g), the one towards w, every derivative of the three is one of the three again:

    C(x, w):  x̄ = X(c̄, w),   w̄ = W(x, c̄)
    X(g, w):  ḡ = C(x̄, w),   w̄ = W(x̄, g)
    W(x, g):  x̄ = X(g, w̄),   ḡ = C(x, w̄)

so that gradients of any order are exact, cost a matrix product each and need no stored
patches. With a task axis, tasks that share their weights are just more images of one
convolution. For tasks with weights of their own there are two ways, chosen by shape: few
rows a task are batched products of gathered patches; many, on a CPU, are a convolution of
oneDNN's for each task, which gathers nothing. Images are channels-last, so that the pixels
of a window's row lie side by side. (The grouped convolution that `vmap` makes of `conv2d`
is slower than either.)
"""

import inspect
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


class Windows:
    """Images [n, height, width, in] or [tasks, n, height, width, in] under a stride; gathered once, if at all."""

    def __init__(self, x: Tensor, stride: int) -> None:
        self.x, self.stride = x, stride
        self.rows, self.columns = _positions(x.shape[-3], stride), _positions(x.shape[-2], stride)
        self._gathered: Tensor | None = None

    @property
    def gathered(self) -> Tensor:
        """[…, n · positions, 9 · in]."""
        if self._gathered is None:
            self._gathered = _patches(self.x, self.stride)
        return self._gathered


def forwards(windows: Windows, weight: Tensor) -> Tensor:
    """C(x, w). weight: [3, 3, in, out], of all tasks, or [tasks, 3, 3, in, out]; nothing is recorded for autograd."""
    x, stride = windows.x, windows.stride
    shape = (*x.shape[:-3], windows.rows, windows.columns, weight.shape[-1])
    if not _by_library(x, _images(x, weight) * windows.rows * windows.columns):
        return product(windows.gathered, weight.flatten(-4, -2)).view(shape)
    if weight.ndim == 4:
        return _convolved(x.flatten(0, -4), weight, stride).view(shape)
    return _each([_convolved(*one, stride) for one in zip(x, weight, strict=True)])


def to_images(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """X(g, w), likewise."""
    shape = (height, width, weight.shape[-2])
    if not _by_library(grad, _images(grad, weight) * grad.shape[-3] * grad.shape[-2]):
        flat = grad.reshape(*grad.shape[:-4], -1, grad.shape[-1])
        taken = product(flat, weight.flatten(-4, -2).mT)
        taken = taken.view(-1, *grad.shape[-3:-1], taken.shape[-1])
        return _scatter(taken, height, width, stride).view(*grad.shape[:-3], *shape)
    if weight.ndim == 4:
        return _towards_images(grad.flatten(0, -4), weight, shape, stride).view(*grad.shape[:-3], *shape)
    return _each([_towards_images(*one, shape, stride) for one in zip(grad, weight, strict=True)])


def to_weight(windows: Windows, grad: Tensor, together: bool = False) -> Tensor:
    """W(x, g), of each task, or summed over them: `together`; as `laid_out` lays a weight out."""
    x, stride = windows.x, windows.stride
    together = together or x.ndim == 4
    if not _by_library(x, grad.shape[0 if together else 1 : -1].numel()):
        gathered, flat = windows.gathered, grad.reshape(*grad.shape[:-4], -1, grad.shape[-1])
        if together:
            gathered, flat = gathered.flatten(0, -2), flat.flatten(0, -2)
        weight = product(flat.mT, gathered)
        return weight.view(*weight.shape[:-1], 3, 3, x.shape[-1]).movedim(-4, -1)
    if together:
        return _towards_weight(x.flatten(0, -4), grad.flatten(0, -4), stride)
    return _each([_towards_weight(*one, stride) for one in zip(x, grad, strict=True)])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of a, also where the factors are rounded on the way (`engine.precision`)."""
    return (a @ b).to(a.dtype)


def laid_out(weight: Tensor) -> Tensor:
    """The same [3, 3, in, out] with out the slowest axis in memory, which oneDNN reads and writes as it is."""
    return weight.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def _each(tasks: list[Tensor]) -> Tensor:
    """[tasks, …] of images, or of weights, whose slowest axis in memory is the last."""
    if len(tasks) == 1:
        return tasks[0][None]
    if tasks[0].is_contiguous():
        return torch.stack(tasks)
    return torch.stack([weight.movedim(-1, 0) for weight in tasks]).movedim(1, -1)


def _images(x: Tensor, weight: Tensor) -> int:
    """How many share a weight."""
    return x.shape[:-3].numel() if weight.ndim == 4 else x.shape[1]


def _by_library(x: Tensor, rows: int) -> bool:
    """Whether oneDNN is the faster of the two; rows: positions of all images that share a weight."""
    return x.device.type == "cpu" and rows >= MANY_ROWS


def _convolved(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return _nhwc(F.conv2d(_nchw(x), _oihw(weight), stride=stride, padding=1)).to(x.dtype)


def _towards_images(grad: Tensor, weight: Tensor, shape: tuple[int, int, int], stride: int) -> Tensor:
    some = grad.new_empty(grad.shape[0], *shape)
    return _nhwc(_backwards(grad, some, weight, stride, [True, False, False])[0])


def _towards_weight(x: Tensor, grad: Tensor, stride: int) -> Tensor:
    some = x.new_empty(grad.shape[-1], 3, 3, x.shape[-1]).movedim(0, -1)
    return _backwards(grad, x, some, stride, [False, True, False])[1].permute(2, 3, 1, 0)


def _backwards(grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: list[bool]) -> tuple[Tensor, ...]:
    """conv2d's derivatives; only the shape and layout of what has its own derivative taken are read."""
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        _nchw(grad), _nchw(x), _oihw(weight), None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    return found


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _oihw(weight: Tensor) -> Tensor:
    return weight.permute(3, 2, 0, 1)


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
