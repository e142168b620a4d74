"""Sequence ops shared by every model: one function each, with interchangeable backends.

Shape letters, the same in the whole code base: B batch, L tokens (H*W of a grid), D channels, N state size,
G groups of channels that share B and C, K scan paths, P steps of a path, W width of a convolution.
"""

from zoo.kernels._backend import Backend, backend, use_backend
from zoo.kernels.add_norm import MAX_NORM_CHANNELS, add_layer_norm, add_rms_norm
from zoo.kernels.autocast import autocast_dtype
from zoo.kernels.bias_gelu import bias_gelu
from zoo.kernels.causal_conv1d import causal_conv1d
from zoo.kernels.custom_op import custom_op
from zoo.kernels.depthwise_conv2d import DEPTHWISE_KERNELS, Activation, activate, depthwise_conv2d
from zoo.kernels.dt_projection import (
    dt_projection_backward,
    pad_projections,
    project_rows,
    split_rows,
    stacked_weight_gradient,
    steps_of_rows,
)
from zoo.kernels.exporting import is_exporting
from zoo.kernels.gated_norm import GATES, GateActivation, gated_layer_norm, gated_norm_in_steps, gated_rms_norm
from zoo.kernels.registration import without_autocast
from zoo.kernels.selective_scan import LARGEST_WINDOW, projected_scan, selective_scan, selective_scan_fn
from zoo.kernels.ssd import ssd

__all__ = [
    "DEPTHWISE_KERNELS",
    "GATES",
    "LARGEST_WINDOW",
    "MAX_NORM_CHANNELS",
    "Activation",
    "Backend",
    "GateActivation",
    "activate",
    "add_layer_norm",
    "add_rms_norm",
    "autocast_dtype",
    "backend",
    "bias_gelu",
    "causal_conv1d",
    "custom_op",
    "depthwise_conv2d",
    "dt_projection_backward",
    "gated_layer_norm",
    "gated_norm_in_steps",
    "gated_rms_norm",
    "is_exporting",
    "pad_projections",
    "project_rows",
    "projected_scan",
    "selective_scan",
    "selective_scan_fn",
    "split_rows",
    "ssd",
    "stacked_weight_gradient",
    "steps_of_rows",
    "use_backend",
    "without_autocast",
]
