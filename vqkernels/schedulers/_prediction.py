"""What a model predicts, as weights of its output and of the noisy sample.

With x_t = alpha x_0 + sigma z, both the data x_0 and the noise z are linear in (x_t, output):

| prediction_type   | output o is         | x_0                     | z                       |
|-------------------|---------------------|-------------------------|-------------------------|
| "epsilon"         | z                   | (x_t - sigma o) / alpha | o                       |
| "sample"          | x_0                 | o                       | (x_t - alpha o) / sigma |
| "v_prediction"    | alpha z - sigma x_0 | alpha x_t - sigma o     | sigma x_t + alpha o     |
| "flow_prediction" | z - x_0             | x_t - sigma o           | x_t + alpha o           |

"v_prediction" holds where alpha^2 + sigma^2 = 1 (arXiv:2202.00512), "flow_prediction" where
alpha + sigma = 1 (arXiv:2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor

DISCRETE_PREDICTIONS = ("epsilon", "sample", "v_prediction")


def data_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(weight of x_t, weight of the output) in x_0."""
    if prediction_type == "epsilon":
        if bool((alpha == 0).any()):
            raise ValueError(
                "prediction_type must be 'sample' or 'v_prediction' for a schedule that visits a "
                "timestep without any signal (rescale_betas_zero_snr), got 'epsilon': "
                "the noise doesn't tell the sample there"
            )
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return torch.ones_like(alpha), -sigma  # flow_prediction


def noise_weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(weight of x_t, weight of the output) in z."""
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "sample":
        if bool((sigma == 0).any()):
            raise ValueError(
                "prediction_type must be 'epsilon' or 'v_prediction' for a step that starts from "
                "clean data (set_alpha_to_one=True), got 'sample': the data doesn't tell its noise"
            )
        return 1 / sigma, -alpha / sigma
    if prediction_type == "v_prediction":
        return sigma, alpha
    return torch.ones_like(alpha), alpha  # flow_prediction
