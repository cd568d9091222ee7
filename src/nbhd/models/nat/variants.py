"""The published NAT models by name.

Settings are those of the NAT repository's classification models (Hassani et al., "Neighborhood Attention Transformer",
CVPR 2023, table 1; github.com/SHI-Labs/Neighborhood-Attention-Transformer, ``classification/nat.py``). Everything not
listed is `NatConfig`'s default. ``drop_path_rate`` is the published training's; it changes nothing at inference.

================  ==========  ==================  ==========
name              parameters  GFLOP at 224 x 224  top-1 in %
================  ==========  ==================  ==========
``nat_mini``      19,984,174                 2.7        81.8
``nat_tiny``      27,901,582                 4.3        83.2
``nat_small``     50,743,297                 7.8        83.7
``nat_base``      89,769,652                13.7        84.3
================  ==========  ==================  ==========

Parameters are counted with the 1000 labels of ImageNet-1k; FLOP and accuracy are the NAT repository's figures.
"""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": {
        "embed_dim": 64,
        "depths": [3, 4, 6, 5],
        "num_heads": [2, 4, 8, 16],
        "mlp_ratio": 3.0,
        "drop_path_rate": 0.2,
    },
    "nat_tiny": {
        "embed_dim": 64,
        "depths": [3, 4, 18, 5],
        "num_heads": [2, 4, 8, 16],
        "mlp_ratio": 3.0,
        "drop_path_rate": 0.2,
    },
    "nat_small": {
        "embed_dim": 96,
        "depths": [3, 4, 18, 5],
        "num_heads": [3, 6, 12, 24],
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.3,
        "layer_scale_init_value": 1e-5,
    },
    "nat_base": {
        "embed_dim": 128,
        "depths": [3, 4, 18, 5],
        "num_heads": [4, 8, 16, 32],
        "mlp_ratio": 2.0,
        "drop_path_rate": 0.5,
        "layer_scale_init_value": 1e-5,
    },
}
