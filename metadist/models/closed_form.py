"""A network's loss, gradient and Hessian-vector products in closed form, for all tasks of a shard at once.

For the networks of convolution, batch norm, maximum (or stride) and ReLU. Autograd under `vmap` finds the
same numbers; here nothing is recorded, so that a step costs its products and a few passes over memory:

    gradient:         forwards, then backwards                            ∇L(φ)
    hessian_product:  the tangent of both along v, forward over reverse    H(φ) v

A tangent is the derivative along v of the quantity whose name it carries, `t_` in front. Of the products in the
tangent of a block, X(ȳ, w) → X(t_ȳ, w) + X(ȳ, t_w) and likewise for C and W, none is computed twice, and what the
gradient has gathered, centred and masked is used again. A parameter is [...], of all tasks, or [tasks, ...], their own;
gradients are of each task, or summed over them (`together`), which is one large product for a convolution.

The first layer works on the images' patches (`first_layer.py`). Its pixels are laid out pooling window by pooling
window, so that a maximum is one of four large blocks, and its tallest tensor is gone before the next layer begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.models.conv4 import BLOCKS, FEW_CHANNELS, Conv4
from metadist.models.convolution import Windows, forwards, laid_out, product, summed, to_images, to_weight
from metadist.models.network import Network, Params, Statistics
from metadist.models.norm import EPSILON
from metadist.models.pooling import Passed, pool

CACHE = 2**25
"""Bytes of the largest tensor that a CPU makes: tasks whose tensors are larger are taken in turn."""


def closed_form(network: Network) -> "ClosedForm | None":
    """None where a network has none."""
    return ClosedForm(network) if isinstance(network, Conv4) and _offered(network) else None


def _offered(network: Conv4) -> bool:
    return (
        network.image[0] <= FEW_CHANNELS
        and (network.norm, network.activation) == ("batch", "relu")
        and (network.strided or (network.pooling == "max" and network.pools == len(BLOCKS)))
        and network.hidden is None
        and network.outputs is not None
        and not network.maps
    )


class Images(NamedTuple):
    """Of every task what the first layer needs of its images; the same in every inner step.

    columns: [tasks, 9 · channels + 1, phases · positions], centred patches and ones; centre: [tasks, 1, 9 · channels];
    covariance: [tasks, 9 · channels, 9 · channels]; grid: (tasks, n, rows, columns) behind the first block;
    phases: 4 pixels of a window, or 1.
    """

    columns: Tensor
    centre: Tensor
    covariance: Tensor
    grid: tuple[int, int, int, int]
    phases: int


@dataclass
class FirstTape:
    """What the first block's gradient leaves for its tangent."""

    images: Images
    kernel: Tensor
    scale: Tensor
    r: Tensor
    moved: Tensor  # covariance · kernel
    y: Tensor  # [tasks, phases, positions, width], used up by the maximum
    passed: Passed
    to_extended: Tensor | None = None


@dataclass
class Tape:
    """The same of a later block: centred outputs, 1/√(variance + ε), and what backwards adds."""

    windows: Windows
    weight: Tensor
    scale: Tensor
    r: Tensor
    centred: Tensor
    passed: Passed
    to_normal: Tensor | None = None
    sums: tuple[Tensor, Tensor] | None = None
    to_y: Tensor | None = None


class Record(NamedTuple):
    """Of one gradient, for products at the same parameters."""

    first: FirstTape
    blocks: list[Tape]
    features: Tensor
    head: Tensor
    probabilities: Tensor
    to_logits: Tensor


class Found(NamedTuple):
    """loss, score: [tasks]; gradient: by name; statistics: what the norms used, [tasks, …] by name."""

    loss: Tensor
    score: Tensor
    gradient: dict[str, Tensor]
    statistics: Statistics
    record: Record


class ClosedForm:
    """Of one network."""

    def __init__(self, network: Conv4) -> None:
        self.strided, self.width = network.strided, network.width
        self.stride = 2 if self.strided else 1

    def at_once(self, x: Tensor) -> int:
        """How many tasks; x: [tasks, n, channels, height, width]."""
        tasks, n, _, height, width = x.shape
        if x.device.type != "cpu":
            return tasks
        tallest = n * height * width * self.width * x.element_size() // (4 if self.strided else 1)
        return min(tasks, max(1, CACHE // tallest))

    def laid_out(self, params: Params) -> dict[str, Tensor]:
        """The same parameters in the layout that gradients have."""
        return {name: laid_out(value) if value.ndim == 4 else value for name, value in params.items()}

    def summed(self, gradient: Params) -> dict[str, Tensor]:
        """Over the tasks."""
        return {name: summed(value) if value.ndim == 5 else value.sum(0) for name, value in gradient.items()}

    def images(self, x: Tensor) -> Images:
        """x: [tasks, n, channels, height, width]."""
        tasks, n, channels, height, width = x.shape
        stride, depth, phases = self.stride, 9 * channels, 1
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        padded = F.pad(x, (1, 1, 1, 1))
        task, image, channel, row, column = padded.stride()
        windows = (tasks, 3, 3, channels, n, height, width)
        taken = padded.as_strided(windows, (task, row, column, channel, image, stride * row, stride * column))
        columns = x.new_empty(tasks, depth + 1, n * height * width)
        columns[:, :depth].view(windows).copy_(taken)
        columns[:, depth] = 1
        flat = columns[:, :depth]
        centre = flat.mean(-1, keepdim=True)
        flat.sub_(centre)
        covariance = product(flat, flat.mT) / flat.shape[-1]
        if not self.strided:
            # An odd last row or column is in the statistics, and in no window.
            columns = columns.view(tasks, depth + 1, n, height, width)
            height, width, phases = height // 2, width // 2, 4
            columns = columns[..., : 2 * height, : 2 * width].reshape(tasks, depth + 1, n, height, 2, width, 2)
            columns = columns.permute(0, 1, 4, 6, 2, 3, 5).reshape(tasks, depth + 1, -1)
        return Images(columns, centre.mT, covariance, (tasks, n, height, width), phases)

    def gradient(
        self, params: Params, images: Images, y: Tensor, together: bool = False, products: bool = True
    ) -> Found:
        """Mean cross-entropy of every task and its gradient; y: int64 [tasks, n]; products: whether any will be asked
        of the record."""
        statistics: Statistics = {}
        first, x = self._first(params, images, statistics)
        blocks: list[Tape] = []
        for block in BLOCKS[1:]:
            tape, x = self._block(block, params, x, statistics)
            blocks.append(tape)
        features = x.mean((2, 3)) if self.strided else x.flatten(2)
        head, bias = params["head.weight"], params["head.bias"]
        logits = product(features, head) + (bias if bias.ndim == 1 else bias[:, None])
        log = F.log_softmax(logits, -1)
        n = y.shape[1]
        loss = -log.gather(-1, y[..., None]).mean((1, 2))
        score = (logits.argmax(-1) == y).double().mean(1)
        probabilities = log.exp()
        right = y[..., None] == torch.arange(logits.shape[-1], device=y.device)
        to_logits = (probabilities - right.to(log.dtype)) / n
        gradient: dict[str, Tensor] = {}
        self._head(gradient, features, to_logits, together)
        to_x = self._to_maps(product(to_logits, head.mT), x.shape)
        for block, tape in reversed(list(zip(BLOCKS[1:], blocks, strict=True))):
            to_x = self._block_back(block, tape, to_x, gradient, together)
        self._first_back(first, to_x, gradient, together, products)
        return Found(loss, score, gradient, statistics, Record(first, blocks, features, head, probabilities, to_logits))

    def hessian_product(self, record: Record, v: Mapping[str, Tensor], together: bool = False) -> dict[str, Tensor]:
        """H v of every task; v: [tasks, …] by name."""
        first, blocks, features, head, probabilities, to_logits = record
        t_x = self._first_tangent(first, v)
        tangents = []
        for block, tape in zip(BLOCKS[1:], blocks, strict=True):
            carried, t_x = self._block_tangent(block, tape, t_x, v)
            tangents.append(carried)
        shape = t_x.shape
        t_features = t_x.mean((2, 3)) if self.strided else t_x.flatten(2)
        t_logits = product(t_features, head) + product(features, v["head.weight"]) + v["head.bias"][:, None]
        moved = probabilities * t_logits
        t_to_logits = (moved - probabilities * moved.sum(-1, keepdim=True)) / t_logits.shape[1]
        found: dict[str, Tensor] = {}
        self._head(found, features, t_to_logits, together, t_features, to_logits)
        t_to_features = product(t_to_logits, head.mT) + product(to_logits, v["head.weight"].mT)
        t_to_x = self._to_maps(t_to_features, shape)
        for block, tape, carried in reversed(list(zip(BLOCKS[1:], blocks, tangents, strict=True))):
            t_to_x = self._block_back_tangent(block, tape, carried, t_to_x, v, found, together)
        self._first_back_tangent(first, t_to_x, v, found, together)
        return found

    # --- the head

    def _head(
        self, into: dict[str, Tensor], features: Tensor, to_logits: Tensor, together: bool, *tangent: Tensor
    ) -> None:
        weight = product(features.mT, to_logits)
        if tangent:
            t_features, at_logits = tangent
            weight = weight + product(t_features.mT, at_logits)
        _put(into, {"head.weight": weight, "head.bias": to_logits.sum(1)}, together)

    def _to_maps(self, to_features: Tensor, shape: torch.Size) -> Tensor:
        if not self.strided:
            return to_features.reshape(shape)
        return (to_features / (shape[2] * shape[3]))[:, :, None, None].expand(shape)

    # --- the first block

    def _first(self, params: Params, images: Images, statistics: Statistics) -> tuple[FirstTape, Tensor]:
        kernel = params["conv1.weight"].flatten(-4, -2)
        scale, shift = _row(params["conv1.norm.scale"]), _row(params["conv1.norm.shift"])
        moved = product(images.covariance, kernel)
        variance = (moved * kernel).sum(-2, keepdim=True)
        statistics["conv1.norm.mean"] = product(images.centre, kernel)[:, 0]
        statistics["conv1.norm.variance"] = variance[:, 0]
        r = torch.rsqrt(variance + EPSILON)
        extended = torch.cat([kernel * (scale * r), shift.expand(r.shape)], 1)
        y = self._first_outputs(images, extended)
        out = None
        if self.strided:
            # Tasks between pixels and channels where they are to be the groups of the next convolution.
            grouped = y.is_cpu and params["conv2.weight"].ndim == 5
            out = y.new_empty(y.shape[2], len(y), self.width).transpose(0, 1) if grouped else y[:, 0]
        passed = pool(y.unbind(1), out)
        return FirstTape(images, kernel, scale, r, moved, y, passed), passed.out.view(*images.grid, -1)

    def _first_outputs(self, images: Images, extended: Tensor) -> Tensor:
        """[tasks, phases, positions, width]."""
        return product(images.columns.mT, extended).view(extended.shape[0], images.phases, -1, self.width)

    def _first_back(
        self, tape: FirstTape, to_x: Tensor, into: dict[str, Tensor], together: bool, products: bool
    ) -> None:
        to_extended = tape.to_extended = self._to_extended(tape, to_x, last=not products)
        to_kernel, to_shift = to_extended[:, :-1], to_extended[:, -1]
        to_a = (to_kernel * tape.kernel).sum(-2, keepdim=True)
        slope = tape.scale * tape.r.pow(3) * to_a  # −2 v̄
        found = to_kernel * (tape.scale * tape.r) - slope * tape.moved
        self._put_first(into, found, (to_a * tape.r)[:, 0], to_shift, together)

    def _to_extended(self, tape: FirstTape, to_x: Tensor, last: bool = False) -> Tensor:
        """What it spreads is written over to_x where that is as large, or, if for the last time, over y, the network's
        tallest tensor."""
        to_x = to_x.flatten(1, 3)
        to_y = to_x[:, None] if self.strided else tape.y if last else torch.empty_like(tape.y)
        tape.passed.backwards(to_x, to_y.unbind(1))
        return product(tape.images.columns, to_y.flatten(1, 2))

    def _first_tangent(self, tape: FirstTape, v: Mapping[str, Tensor]) -> Tensor:
        t_kernel, t_scale, t_shift = _first_of(v)
        t_r = -tape.r.pow(3) * (tape.moved * t_kernel).sum(-2, keepdim=True)
        t_a = t_scale * tape.r + tape.scale * t_r
        t_extended = torch.cat([t_kernel * (tape.scale * tape.r) + tape.kernel * t_a, t_shift], 1)
        t_y = self._first_outputs(tape.images, t_extended)
        t_x = tape.passed.forwards(t_y.unbind(1), t_y[:, 0] if self.strided else None)
        return t_x.view(*tape.images.grid, -1)

    def _first_back_tangent(
        self, tape: FirstTape, t_to_x: Tensor, v: Mapping[str, Tensor], into: dict[str, Tensor], together: bool
    ) -> None:
        assert tape.to_extended is not None
        t_kernel, t_scale, _ = _first_of(v)
        scale, r, moved, kernel, to_kernel = tape.scale, tape.r, tape.moved, tape.kernel, tape.to_extended[:, :-1]
        t_r = -r.pow(3) * (moved * t_kernel).sum(-2, keepdim=True)
        t_a = t_scale * r + scale * t_r
        t_to_extended = self._to_extended(tape, t_to_x)
        t_to_kernel = t_to_extended[:, :-1]
        to_a = (to_kernel * kernel).sum(-2, keepdim=True)
        t_to_a = (t_to_kernel * kernel + to_kernel * t_kernel).sum(-2, keepdim=True)
        slope = scale * r.pow(3) * to_a
        t_slope = (t_scale * r + 3 * scale * t_r) * r.square() * to_a + scale * r.pow(3) * t_to_a
        found = t_to_kernel * (scale * r) + to_kernel * t_a
        found = found - t_slope * moved - slope * product(tape.images.covariance, t_kernel)
        self._put_first(into, found, (t_to_a * r + to_a * t_r)[:, 0], t_to_extended[:, -1], together)

    def _put_first(self, into: dict[str, Tensor], kernel: Tensor, scale: Tensor, shift: Tensor, together: bool) -> None:
        weight = kernel.view(kernel.shape[0], 3, 3, -1, kernel.shape[-1])
        _put(into, {"conv1.weight": weight, "conv1.norm.scale": scale, "conv1.norm.shift": shift}, together)

    # --- a later block

    def _block(self, name: str, params: Params, x: Tensor, statistics: Statistics) -> tuple[Tape, Tensor]:
        weight = params[f"{name}.weight"]
        scale, shift = _row(params[f"{name}.norm.scale"]), _row(params[f"{name}.norm.shift"])
        windows = Windows(x, self.stride)
        y = forwards(windows, weight)
        shape, y = y.shape, y.flatten(1, 3)
        mean = y.sum(1, keepdim=True) * (1 / y.shape[1])
        centred = y.sub_(mean)
        variance = (centred * centred).mean(1, keepdim=True)
        statistics[f"{name}.norm.mean"], statistics[f"{name}.norm.variance"] = mean[:, 0], variance[:, 0]
        r = torch.rsqrt(variance + EPSILON)
        normal = torch.addcmul(shift, centred, scale * r).view(shape)
        passed = pool(self._pixels(normal), normal if self.strided else None)
        return Tape(windows, weight, scale, r, centred.view(shape), passed), passed.out

    def _block_back(self, name: str, tape: Tape, to_x: Tensor, into: dict[str, Tensor], together: bool) -> Tensor:
        n = tape.centred.shape[1:4].numel()
        centred, r = tape.centred.flatten(1, 3), tape.r
        to_normal = tape.to_normal = self._spread(tape, to_x).flatten(1, 3)
        total, along = to_normal.sum(1, keepdim=True), (to_normal * centred).sum(1, keepdim=True)
        tape.sums = total, along
        a, to_scale = tape.scale * r, along * r
        mean = a * (-1 / n)
        to_y = torch.addcmul(mean * total, to_normal, a).addcmul_(centred, mean * to_scale * r)
        tape.to_y = to_y.view(tape.centred.shape)
        _put(into, {f"{name}.norm.scale": to_scale[:, 0], f"{name}.norm.shift": total[:, 0]}, together)
        into[f"{name}.weight"] = to_weight(tape.windows, tape.to_y, together)
        return to_images(tape.to_y, tape.weight, *_size(tape), tape.windows.stride)

    def _block_tangent(
        self, name: str, tape: Tape, t_x: Tensor, v: Mapping[str, Tensor]
    ) -> tuple[tuple[Windows, Tensor, Tensor], Tensor]:
        t_scale, t_shift = _row(v[f"{name}.norm.scale"]), _row(v[f"{name}.norm.shift"])
        t_windows = Windows(t_x, tape.windows.stride)
        t_y = forwards(t_windows, tape.weight).add_(forwards(tape.windows, v[f"{name}.weight"])).flatten(1, 3)
        centred = tape.centred.flatten(1, 3)
        t_centred = t_y.sub_(t_y.mean(1, keepdim=True))
        t_r = -tape.r.pow(3) * (centred * t_centred).mean(1, keepdim=True)
        a, t_a = tape.scale * tape.r, t_scale * tape.r + tape.scale * t_r
        t_normal = torch.addcmul(t_shift, centred, t_a).addcmul_(t_centred, a).view(tape.centred.shape)
        return (t_windows, t_centred, t_r), tape.passed.forwards(self._pixels(t_normal))

    def _block_back_tangent(
        self,
        name: str,
        tape: Tape,
        carried: tuple[Windows, Tensor, Tensor],
        t_to_x: Tensor,
        v: Mapping[str, Tensor],
        into: dict[str, Tensor],
        together: bool,
    ) -> Tensor:
        assert tape.to_normal is not None
        assert tape.to_y is not None
        assert tape.sums is not None
        t_windows, t_centred, t_r = carried
        n, centred, to_normal = t_centred.shape[1], tape.centred.flatten(1, 3), tape.to_normal
        scale, r, t_scale = tape.scale, tape.r, _row(v[f"{name}.norm.scale"])
        total, along = tape.sums
        a, t_a = scale * r, t_scale * r + scale * t_r
        t_to_normal = self._spread(tape, t_to_x).flatten(1, 3)
        t_total = t_to_normal.sum(1, keepdim=True)
        t_along = (t_to_normal * centred).addcmul_(to_normal, t_centred).sum(1, keepdim=True)
        slope = a * r.square() * along / n
        t_slope = ((t_a * r + 2 * a * t_r) * r * along + a * r.square() * t_along) / n
        t_to_y = torch.addcmul((t_a * total + a * t_total) / -n, to_normal, t_a).addcmul_(t_to_normal, a)
        t_to_y = t_to_y.addcmul_(centred, -t_slope).addcmul_(t_centred, -slope).view(tape.centred.shape)
        norm = {f"{name}.norm.scale": (t_along * r + along * t_r)[:, 0], f"{name}.norm.shift": t_total[:, 0]}
        _put(into, norm, together)
        weight = to_weight(tape.windows, t_to_y, together)
        into[f"{name}.weight"] = weight.add_(to_weight(t_windows, tape.to_y, together))
        size, stride = _size(tape), tape.windows.stride
        return to_images(t_to_y, tape.weight, *size, stride).add_(
            to_images(tape.to_y, v[f"{name}.weight"], *size, stride)
        )

    def _pixels(self, x: Tensor) -> list[Tensor]:
        """The pixels of every window, one after the other; all pixels where nothing is pooled."""
        if self.strided:
            return [x]
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        return [x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]

    def _spread(self, tape: Tape, to_out: Tensor) -> Tensor:
        """Towards the norm's outputs; an odd last row or column is in no window."""
        height, width = tape.centred.shape[2:4]
        odd = not self.strided and (height % 2 or width % 2)
        into = torch.zeros_like(tape.centred) if odd else torch.empty_like(tape.centred)
        tape.passed.backwards(to_out, self._pixels(into))
        return into


def _size(tape: Tape) -> tuple[int, int]:
    """Height and width of the inputs."""
    _, _, height, width, _ = tape.windows.x.shape
    return height, width


def _row(value: Tensor) -> Tensor:
    """[…, 1, width]."""
    return value[..., None, :]


def _first_of(v: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return v["conv1.weight"].flatten(-4, -2), _row(v["conv1.norm.scale"]), _row(v["conv1.norm.shift"])


def _put(into: dict[str, Tensor], values: dict[str, Tensor], together: bool) -> None:
    into |= {name: value.sum(0) for name, value in values.items()} if together else values
