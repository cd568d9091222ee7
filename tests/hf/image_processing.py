"""What transformers' common tests of image processors are told of NAT's; see `run`."""

from __future__ import annotations

import unittest

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from nbhd.models import NatImageProcessor


class NatImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent: unittest.TestCase, **kwargs: object) -> None:
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.3, 0.4, 0.5])
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        # As registered: one class, which uses Pillow whether torchvision is there or not.
        return {"pil": NatImageProcessor, "torchvision": NatImageProcessor}


class NatImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = NatImageProcessingTester
