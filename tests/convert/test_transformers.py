"""Converted weights in this network, compared with transformers' modules (PyTorch, float32)."""

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

import vxl_jax
from convert import convert_from_hf, convert_to_hf, init_checkpoint
from tests.support.checkpoints import assert_same, tensors_in
from vxl_jax.checkpoints.safetensors_read import find_tensors
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def models(request, tmp_path_factory):
    """Random Qwen2 and CLIP as transformers saves them, and the model made of them here."""
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=80,
            eos_token_id=7,
            tie_word_embeddings=request.param,
            initializer_range=0.3,
        )
    )
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=28,
            patch_size=7,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=56,
            initializer_factor=5.0,
        )
    )
    for name, parameter in [*qwen.named_parameters(), *clip.named_parameters()]:
        if name.endswith("bias"):  # they start as zeros, which would hide a wrong one
            torch.nn.init.normal_(parameter, std=0.5)
    qwen.save_pretrained(folder / "qwen")
    clip.save_pretrained(folder / "clip")
    init_checkpoint(folder / "qwen", folder / "clip", folder / "new")
    return qwen.eval(), clip.eval(), folder / "new"


def test_text_logits_are_those_of_qwen2(models):
    qwen, _, directory = models
    model = vxl_jax.load_network(directory)
    ids = np.random.default_rng(0).integers(0, 96, 50)
    stream = plan_stream(ids, [], window=model.config.window, ratio=None)
    ours = model.logits(model(batch_streams([stream])))[0]
    with torch.no_grad():
        theirs = qwen(torch.tensor(ids)[None]).logits[0].numpy()
    assert abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * abs(theirs).max())


def test_plain_qwen2_loads_and_has_the_same_logits(models, tmp_path):
    qwen, _, directory = models
    model = vxl_jax.load_network(directory.parent / "qwen")
    assert model.config.vision is None
    assert model.config.compression is None
    assert not hasattr(model.language.layers.attention, "beacon_q")
    ids = np.random.default_rng(0).integers(0, 96, 50)
    stream = plan_stream(ids, [], window=model.config.window, ratio=None)
    ours = model.logits(model(batch_streams([stream])))[0]
    with torch.no_grad():
        theirs = qwen(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * abs(theirs).max())
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert_from_hf(directory.parent / "qwen", ours)
    convert_to_hf(ours, back)
    assert_same(tensors_in(back), tensors_in(directory.parent / "qwen"))
    with pytest.raises(vxl_jax.ConfigError, match="reads text alone"):
        model.encode(np.zeros((1, 2, 28, 28, 3), np.uint8))


def test_features_are_those_of_clip(models):
    _, clip, directory = models
    model = vxl_jax.load_network(directory)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 28, 28, 3), np.uint8)
    ours = jax.jit(lambda model, pixels: model.vision(pixels))(model, pixels)
    mean, std = (
        np.array(x, np.float32)
        for x in (model.config.vision.image_mean, model.config.vision.image_std)
    )
    normal = torch.tensor((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = clip(normal, output_hidden_states=True).hidden_states
    theirs = states[model.config.vision.feature_layer][:, 1:].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * abs(theirs).max())


def test_an_exported_model_loads_in_transformers(models, tmp_path):
    qwen, _, directory = models
    convert_to_hf(directory, tmp_path / "hf")
    tensors, _ = find_tensors(tmp_path / "hf")
    state = {
        name: torch.tensor(tensors[name].read().copy())
        for name in qwen.state_dict()
        if name in tensors
    }
    again = Qwen2ForCausalLM(qwen.config).eval()
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    for name, value in again.state_dict().items():
        assert torch.equal(value, qwen.state_dict()[name]), name
