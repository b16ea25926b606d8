"""Residual networks and their plain twins in JAX."""

from flaxnets.errors import InputError
from flaxnets.models import create_model, list_models
from flaxnets.models.torch_weights import load_torch, save_torch
from flaxnets.studies.restore import restore
from flaxnets.study import Study

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Study",
    "__version__",
    "create_model",
    "list_models",
    "load_torch",
    "restore",
    "save_torch",
]
