"""metadist: distributed meta-training with the same bits for any number of workers."""

__version__ = "0.1.0"
