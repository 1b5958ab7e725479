"""What a model that sees computes where there is nothing to see, and what its parts are against their slow twins."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as configs
from moejax.config import Config, Data, Mesh, Model, MoE
from moejax.data.batch import Images
from moejax.model.sharded import Sharded
from moejax.model.vision import cubic
from moejax.parallel.mesh import make_mesh

B, T, I, F, S = 3, 19, 2, 2, 23
TEXT = Model(layers=4, pattern="MD", d_model=44, heads=4, kv_heads=1, head_dim=10, hidden=52,
             moe=MoE(experts=4, hidden=28))
SEES = replace(TEXT, pattern="VDMW", vision=f"clip size={S} patch=5 width=24 layers=2 heads=3 hidden=34",
               cross=f"all latents=5 head=6 heads=2 frames={F}")
TEXT_TWIN = replace(TEXT, pattern="MDMD")


@cache
def made(model: Model) -> tuple[Sharded, dict]:
    config = Config(model=model, data=Data(sequence=T, batch=B, images=I if model.vision else 0))
    sharded = Sharded(config, make_mesh(Mesh(), jax.devices()[:1]))
    return sharded, sharded.init(5)


def opened(weights: dict) -> dict:
    """As if the gates had been trained."""
    return {name: value + 0.3 if name.endswith("gate") else value for name, value in weights.items()}


def batch(seed: int = 0) -> tuple[np.ndarray, Images]:
    random = np.random.default_rng(seed)
    looks = np.zeros((B, T, I), bool)
    looks[1:, 4:, 0] = looks[1, 11:, 1] = True
    pixels = random.integers(0, 256, (B, I, F, S, S, 3)).astype(np.uint8)
    return random.integers(0, 256, (B, T)).astype(np.int32), Images(pixels, np.array([[0, 0], [1, 2], [2, 0]]).astype(
        np.int32), looks)


def test_at_the_start_the_logits_are_those_of_the_text_model_bit_for_bit():
    text, weights = made(TEXT_TWIN)
    sees, more = made(SEES)
    tokens, images = batch()
    expected = text.forward(weights, tokens, None).logits
    for seen in (images, None):
        np.testing.assert_array_equal(sees.forward(more, tokens, seen).logits, expected)


def test_a_layer_starts_the_same_whatever_it_is_stacked_with():
    (_, a), (_, b) = made(TEXT), made(TEXT_TWIN)
    np.testing.assert_array_equal(a["runs.0.0.attention.q"][1], b["runs.0.0.attention.q"][1])
    np.testing.assert_array_equal(a["head"], b["head"])
    assert not np.array_equal(a["runs.0.0.attention.q"][0], a["runs.0.0.attention.q"][1])


def test_what_sees_no_image_is_unchanged_and_the_rest_is_not():
    text, weights = made(TEXT_TWIN)
    sees, more = made(SEES)
    tokens, images = batch()
    expected, found = (np.asarray(s.forward(w, tokens, i).logits) for s, w, i in (
        (text, weights, None), (sees, opened(more), images)))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[:, :4], expected[:, :4])
    assert np.abs(found[1:, 4:] - expected[1:, 4:]).max(-1).min() > 1e-3


@pytest.mark.parametrize("changed, differs", [
    ((1, 1, 0), slice(11, None)),  # the second image of the second sequence, from where it is seen
    ((2, 0, 1), slice(4, None)),  # the second frame of a video
    ((2, 1, 0), slice(T, None)),  # an image that is not there
    ((1, 0, 1), slice(T, None))])  # a frame that is not there
def test_a_token_depends_on_the_images_it_looks_at_alone(changed, differs):
    sees, weights = made(SEES)
    tokens, images = batch()
    other = images.pixels.copy()
    other[changed] ^= 255
    a, b = (np.asarray(sees.forward(opened(weights), tokens, images._replace(pixels=pixels)).logits)
            for pixels in (images.pixels, other))
    apart = np.abs(a - b).max(-1)
    expected = np.zeros((B, T), bool)
    expected[changed[0], differs] = True
    np.testing.assert_array_equal(apart > 0, expected)


def test_with_every_token_through_the_gated_mlp_text_alone_differs():
    every = replace(SEES, cross=SEES.cross + " feed=every gate=vector norm=head latent_norm=head")
    sees, weights = made(every)
    tokens, _ = batch()
    a, b = (np.asarray(sees.forward(w, tokens, None).logits) for w in (weights, opened(weights)))
    assert np.abs(a - b).max(-1).min() > 1e-3


def test_without_latents_text_looks_at_the_patches_of_the_frames_that_are_there():
    sees, weights = made(replace(SEES, cross=f"last latents=0 frames={F}"))
    tokens, images = batch()
    weights = opened(weights)
    a = np.asarray(sees.forward(weights, tokens, images).logits)
    pixels = images.pixels.copy()
    pixels[1, 0, 1] = 7  # not there
    np.testing.assert_array_equal(sees.forward(weights, tokens, images._replace(pixels=pixels)).logits, a)
    pixels[2, 0, 1] = 7  # there
    assert not np.array_equal(sees.forward(weights, tokens, images._replace(pixels=pixels)).logits, a)


def test_normalised_numbers_are_taken_as_they_are():
    sees, weights = made(SEES)
    tokens, images = batch()
    told = SEES.encoder()
    numbers = (images.pixels.astype(np.float32) / 255 - np.float32(told.mean)) / np.float32(told.std)
    a, b = (sees.forward(opened(weights), tokens, images._replace(pixels=pixels)).hidden
            for pixels in (images.pixels, numbers))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # rounding of the normalisation


def test_patches_are_a_convolution():
    sees, weights = made(SEES)
    kernel = weights["vision.encoder.patch"]  # colour row column width
    pixels = jnp.asarray(batch()[1].pixels[0, 0, :1], jnp.float32)
    expected = jax.lax.conv_general_dilated(pixels, kernel, (5, 5), "VALID", dimension_numbers=("NHWC", "IHWO", "NHWC"))

    def device(values):
        return sees.build(values).vision.encoder.patches(pixels, jnp.float32)

    found = jax.jit(sees.program(device, (), jax.sharding.PartitionSpec()))(weights)
    np.testing.assert_allclose(found, expected.reshape(1, 16, 24), rtol=1e-4, atol=1e-3)  # sums of 75 bytes


def test_bicubic_interpolation_keeps_what_it_should():
    np.testing.assert_allclose(cubic(5, 5), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(cubic(4, 9).sum(1), 1, atol=1e-6)
    # Halfway between two samples a = -0.75 weighs 4 neighbours by -3/32, 19/32, 19/32, -3/32.
    np.testing.assert_allclose(cubic(8, 4)[1] * 32, [0, -3, 19, 19, -3, 0, 0, 0], atol=1e-5)


def test_a_siglip_encoder_pools_by_its_head():
    model = Model(layers=0, vision="siglip size=21 patch=7 width=24 layers=2 heads=3 hidden=34 pool=1")
    assert not configs.check(Config(model=model))
    sharded, weights = made(model)
    assert {name.split(".")[0] for name in weights} == {"vision"}
    pixels = jnp.asarray(batch()[1].pixels[:, 0, 0, :21, :21])

    def device(values):
        return sharded.build(values).vision.encoder(pixels, sharded.run())

    place = jax.sharding.PartitionSpec()
    found = jax.jit(sharded.program(device, (), place))(
        weights | {"vision.encoder.pool.probe": weights["vision.encoder.pool.probe"] + 0.1})
    assert found.hidden.shape == (B, 9, 24) and found.pooled.shape == (B, 24)
    assert np.abs(found.pooled[0] - found.pooled[1]).max() > 1e-4


def test_matrices_are_counted_by_the_rows_they_multiply():
    sees, _ = made(SEES)
    # 2 images of 2 frames of 17 patches, by 19 tokens; 5 latents each
    assert sees.rows_per_token("vision.encoder.block.attention.q") == 2 * 2 * 17 / 19
    assert sees.rows_per_token("vision.resampler.layer.mlp.up") == 2 * 5 / 19
    assert sees.rows_per_token("vision.resampler.layer.attention.k") == (2 * 5 + 2 * 2 * 17) / 19
    assert sees.rows_per_token("runs.0.0.cross.attention.k") == 2 * 5 / 19
    assert sees.rows_per_token("runs.0.0.cross.attention.q") == 1


RULES = [
    ("model.vision=vit size=3", "model.vision is empty or begins with clip, siglip; got 'vit size=3'"),
    ("model.vision=clip size=23", "model.vision=clip needs patch=, width=, layers=, heads=, hidden="),
    (f"model.vision={SEES.vision} size=8", "takes each of"),
    (f"model.vision={SEES.vision} act=tanh", "act= of model.vision takes one of quick_gelu, gelu, gelu_exact,"),
    (f"model.vision={SEES.vision} eps=0", "eps= of model.vision takes a number above 0; got '0'"),
    (f"model.vision={SEES.vision} std=1,0,1", "std= of model.vision takes three numbers above 0; got"),
    (f"model.vision={SEES.vision.replace('heads=3', 'heads=5')}", "heads that divide its width; got heads=5 and width"),
    (f"model.vision={SEES.vision.replace('patch=5', 'patch=50')}", "got patch=50 and size=23"),
    ("model.cross=first", "model.cross is empty or begins with last, all; got 'first'"),
    ("model.cross=", "set model.vision and"),
    ("model.cross=all latents=-1", "latents= of model.cross takes a whole number, 0 or above; got"),
    ("model.pattern=M", "has none; set it to VMM"),
    ("model.pattern=VMX", "made of M (MoE layer) and D (dense layer), or V and W"),
    ("model.layers=-1", "model.layers must not be negative"), ("data.rate=0", "data.rate must be above 0"),
    ("mesh.tensor=4", "mesh.tensor must divide heads= of model.vision; got 4 and 3")]


@pytest.mark.parametrize("override, message", RULES, ids=[override for override, _ in RULES])
def test_what_is_refused(override, message):
    config, problems = configs.override(Config(model=SEES, data=Data(images=2)), [override])
    assert not problems
    assert message in "\n".join(configs.check(config))


def test_images_need_a_model_that_sees_and_a_frozen_text_needs_images():
    assert "data.images=2 needs a model that sees" in "\n".join(configs.check(Config(data=Data(images=2))))
    frozen = configs.Train(freeze=("text",))
    assert "leaves nothing to train" in "\n".join(configs.check(Config(model=SEES, train=frozen)))
    assert "but for an image encoder alone" in "\n".join(configs.check(Config(model=Model(layers=0))))
