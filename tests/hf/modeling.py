"""What transformers' common tests of models, configurations and backbones are told of NAT; see `run`.

Sizes are those of the NAT tests of transformers 4.40.2.
"""

from __future__ import annotations

import unittest

import torch
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from transformers.models.auto import modeling_auto

from nbhd.models import NatBackbone, NatConfig, NatForImageClassification, NatModel

# By these the tests know which class wants labels; registering with the Auto classes does not enter them.
modeling_auto.MODEL_MAPPING_NAMES["nat"] = "NatModel"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["nat"] = "NatForImageClassification"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["nat"] = "NatBackbone"


class NatModelTester:
    batch_size = 13
    image_size = 64
    num_channels = 3
    num_labels = 10
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> NatConfig:
        return NatConfig(
            num_labels=self.num_labels,
            image_size=self.image_size,
            embed_dim=16,
            depths=[1, 2, 1],
            num_heads=[2, 4, 8],
            kernel_size=3,
            mlp_ratio=2.0,
            layer_scale_init_value=0.1,
            out_features=["stage1", "stage2"],
            out_indices=[1, 2],
        )

    def prepare_config_and_inputs(self) -> tuple:
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self) -> tuple:
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class NatModelTest(ModelTesterMixin, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (NatModel, NatForImageClassification, NatBackbone)
    pipeline_model_mapping = {"image-feature-extraction": NatModel, "image-classification": NatForImageClassification}  # noqa: RUF012
    test_resize_embeddings = False  # there are no tokens
    # Asked for whatever the year in the configuration's copyright line: it has none.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = NatModelTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=NatConfig,
            has_text_modality=False,
            embed_dim=37,
            common_properties=["patch_size", "num_channels"],
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    # Three that suppose tokens, as in the tests of transformers' own DiNAT and Swin; each is held to NAT's rules.

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            output = model.get_output_embeddings()
            self.assertTrue(output is None or isinstance(output, torch.nn.Linear))

    def test_attention_outputs(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            shapes = [tuple(a.shape) for a in model(**inputs, output_attentions=True).attentions]
            # One a stage: (batch, heads, height, width, window).
            self.assertEqual(shapes, [(13, 2, 16, 16, 9), (13, 4, 8, 8, 9), (13, 8, 4, 4, 9)])
            model.config.output_attentions = True
            self.assertEqual(len(model(**inputs).attentions), 3)

    def test_hidden_states_output(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            outputs = model(**inputs, output_hidden_states=True)
            shapes = [tuple(state.shape) for state in outputs.hidden_states]
            if model_class is NatBackbone:  # before downsampling
                self.assertEqual(shapes, [(13, 16, 16, 16), (13, 16, 16, 16), (13, 8, 8, 32), (13, 4, 4, 64)])
                continue
            self.assertEqual(shapes, [(13, 16, 16, 16), (13, 8, 8, 32), (13, 4, 4, 64), (13, 4, 4, 64)])
            for state, reshaped in zip(outputs.hidden_states, outputs.reshaped_hidden_states, strict=True):
                self.assertTrue(torch.equal(state.permute(0, 3, 1, 2), reshaped))


class NatBackboneTest(unittest.TestCase, BackboneTesterMixin):
    all_model_classes = (NatBackbone,)
    config_class = NatConfig

    def setUp(self) -> None:
        self.model_tester = NatModelTester(self)
