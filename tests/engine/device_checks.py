"""What torch is asked for, and where: on its device without memory, as far as a GPU's path can be seen without one.

There nothing can be read, and a tensor that was left on the CPU is noticed.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor)
"""Copies from the host, of which no operation is seen where there is no memory to copy to."""


class NoCopies(TorchFunctionMode):
    """Refuses them."""

    def __torch_function__(self, function, types, arguments=(), keys=None):
        assert function not in COPIES, function
        return function(*arguments, **(keys or {}))


class Operations(TorchDispatchMode):
    """Names of the operations, all of whose tensors are on one device; scalars: but for numbers, on the CPU."""

    def __init__(self, device: str, scalars: bool) -> None:
        super().__init__()
        self.device, self.scalars, self.names = device, scalars, set[str]()

    def __torch_dispatch__(self, operation, types, arguments=(), keys=None):
        found = operation(*arguments, **(keys or {}))
        every = [one for one in tree_leaves((arguments, keys, found)) if isinstance(one, torch.Tensor)]
        elsewhere = [one for one in every if one.device.type != self.device and not (self.scalars and one.ndim == 0)]
        assert not elsewhere, operation
        self.names.add(str(operation))
        return found
