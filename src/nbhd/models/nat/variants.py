"""The published NAT and DiNAT models by name.

Settings are those of the NAT repository's classification models (Hassani et al., "Neighborhood Attention Transformer",
CVPR 2023, table 1; Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001;
github.com/SHI-Labs/Neighborhood-Attention-Transformer, ``classification/nat.py`` and ``classification/dinat.py``).
Everything not listed is `NatConfig`'s default. ``drop_path_rate`` is the published training's; it changes nothing at
inference. A DiNAT is a NAT with dilations; those used for detection and segmentation are others, and larger.

=========================  ===========  ============  ==========
name                       parameters   GFLOP         top-1 in %
=========================  ===========  ============  ==========
``nat_mini``                19,984,174  2.7                 81.8
``nat_tiny``                27,901,582  4.3                 83.2
``nat_small``               50,743,297  7.8                 83.7
``nat_base``                89,769,652  13.7                84.3
``dinat_mini``              19,984,174  2.7                 81.8
``dinat_tiny``              27,901,582  4.3                 82.7
``dinat_small``             50,719,681  7.8                 83.8
``dinat_base``              89,769,652  13.7                84.4
``dinat_large``            200,943,514  30.6                86.5
``dinat_large_384``        200,943,514  89.7 at 384         87.2
``dinat_large_384_11x11``  201,144,250  92.4 at 384         87.3
=========================  ===========  ============  ==========

Parameters are counted with the 1000 labels of ImageNet-1k; FLOP (at 224 x 224 where nothing else is said) and accuracy
are the NAT repository's figures; the large models were pre-trained on ImageNet-22k.
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


def _dilated(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a DiNAT: those of a NAT, ``changes``, and every second layer of the first three stages dilated."""
    settings = VARIANTS[name] | changes
    return settings | {"dilations": _alternating(settings["depths"], (8, 4, 2, 1))}


def _alternating(depths: list[int], dilations: tuple[int, ...]) -> list[list[int]]:
    return [[dilation if i % 2 else 1 for i in range(depth)] for depth, dilation in zip(depths, dilations, strict=True)]


VARIANTS |= {
    "dinat_mini": _dilated("nat_mini"),
    "dinat_tiny": _dilated("nat_tiny"),
    "dinat_small": _dilated("nat_small", layer_scale_init_value=0.0),
    "dinat_base": _dilated("nat_base"),
}
VARIANTS["dinat_large"] = _dilated(
    "nat_base", embed_dim=192, num_heads=[6, 12, 24, 48], drop_path_rate=0.35, layer_scale_init_value=0.0
)
VARIANTS["dinat_large_384"] = VARIANTS["dinat_large"] | {"dilations": _alternating([3, 4, 18, 5], (13, 6, 3, 1))}
VARIANTS["dinat_large_384_11x11"] = VARIANTS["dinat_large"] | {"kernel_size": 11}
