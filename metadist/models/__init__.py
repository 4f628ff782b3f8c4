"""Backbones that are pure functions of explicit parameters."""

from metadist.config import Model
from metadist.errors import ConfigError
from metadist.models.conv4 import Conv4
from metadist.models.mlp import MLP
from metadist.models.network import Network
from metadist.models.resnet12 import ResNet12


def build(model: Model, shape: tuple[int, ...], outputs: int | None) -> Network:
    """The network that a config names, for inputs of a shape, images (channels, height, width); without head if
    outputs is None."""
    if model.name == "mlp":
        return MLP(shape, outputs, model.width, model.layers, model.norm, model.activation)
    channels, height, width = shape
    if model.name != "stride2" and min(height, width) < 16:
        raise ConfigError(f"model.name: {model.name} pools four times and needs images of 16 pixels or more")
    if model.name == "resnet12":
        return ResNet12((channels, height, width), outputs, model.width, model.norm, model.activation)
    return Conv4(
        (channels, height, width),
        outputs,
        width=model.width,
        strided=model.name == "stride2",
        pooling=model.pool,
        norm=model.norm,
        activation=model.activation,
        hidden=model.hidden if model.name == "conv4-fc" else None,
    )
