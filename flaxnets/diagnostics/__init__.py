"""Diagnostics of why plain networks degrade, measured in plain networks and their residual twins.

A diagnostic is a class. Its `measure` measures the networks of a study, and returns an instance
with the numbers to store. Figure, sentences and table are made from these numbers alone.
"""

from flaxnets.diagnostics.construction import Construction, insert_identities
from flaxnets.diagnostics.finding import Diagnostic
from flaxnets.diagnostics.gradient_log import GradientLog, LoggedGradients, read_gradients
from flaxnets.diagnostics.gradients import Gradients, gradient_norms, without_batch_norm
from flaxnets.diagnostics.landscape import Landscape, loss_surface, random_direction
from flaxnets.diagnostics.layers import block_names, layer_names
from flaxnets.diagnostics.residuals import Residuals, lesion_errors, residual_ratios
from flaxnets.diagnostics.responses import Responses, layer_responses

# Keyed by file name, in the order in which they are run and shown.
DIAGNOSTICS: dict[str, type[Diagnostic]] = {
    "gradients": Gradients,
    "gradient-log": LoggedGradients,
    "responses": Responses,
    "residuals": Residuals,
    "construction": Construction,
    "landscape": Landscape,
}

__all__ = [
    "DIAGNOSTICS",
    "GradientLog",
    "block_names",
    "gradient_norms",
    "insert_identities",
    "layer_names",
    "layer_responses",
    "lesion_errors",
    "loss_surface",
    "random_direction",
    "read_gradients",
    "residual_ratios",
    "without_batch_norm",
]
