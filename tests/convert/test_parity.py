"""Against numbers of the published implementation: the project's own set and the shared ones."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert import parity
from convert.golden.compare import compare_tensor, compare_thinned
from vxl_jax.checkpoints.hf_config import read_config
from vxl_jax.checkpoints.load import load_network
from vxl_jax.checkpoints.names import name_rows, to_published
from vxl_jax.config import VideoXLConfig
from vxl_jax.errors import CheckpointError
from vxl_jax.models.functions import prefill
from vxl_jax.models.video_xl import VideoXL
from vxl_jax.presets import tiny
from vxl_jax.stream.batch import batch_streams
from vxl_jax.stream.plan import plan_stream
from vxl_jax.text.template import IGNORE, IMAGE_TOKEN

pytestmark = pytest.mark.usefixtures("exact_products")

MICRO = Path(__file__).parents[1] / "golden" / "micro"


@pytest.fixture(scope="module")
def model():
    return load_network(MICRO / "hf")


@pytest.fixture(scope="module")
def language():
    """Numbers of the language model alone, from given visual features."""
    meta = json.loads((MICRO / "language.json").read_text())
    return meta, load_file(MICRO / "language.safetensors")


def test_command_line_passes(capsys):
    assert parity.main([str(MICRO / "hf"), str(MICRO)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("6 tensors, 0 failed")
    assert "ids agree 100%" in lines[-2]


def test_command_line_fails_on_any_difference(tmp_path, capsys):
    shutil.copytree(MICRO, tmp_path / "set")
    tensors = load_file(MICRO / "golden.safetensors")
    for name in ("logits", "visual_features", "beacon_keys_layer0", "beacon_values_last"):
        tensors[f"v3_r4/{name}"] = tensors[f"v3_r4/{name}"] * np.float32(1.0002)
    tensors["v3_r4/memory_len"] = tensors["v3_r4/memory_len"] + 1
    tensors["v3_r4/generated"] = tensors["v3_r4/generated"][::-1].copy()
    save_file(tensors, tmp_path / "set" / "golden.safetensors")
    assert parity.main([str(MICRO / "hf"), str(tmp_path / "set")]) == 1
    output = capsys.readouterr().out
    assert output.count("FAIL") == 6
    assert "6 tensors, 6 failed" in output


def test_tensors_and_cases_that_nothing_compares_fail(tmp_path, capsys):
    shutil.copytree(MICRO, tmp_path / "set")
    tensors = load_file(MICRO / "golden.safetensors")
    tensors["v3_r4/logitz"] = tensors.pop("v3_r4/logits")
    save_file(tensors, tmp_path / "set" / "golden.safetensors")
    meta = json.loads((MICRO / "golden.json").read_text())
    meta["cases"].append({**meta["cases"][0], "name": "other"})
    (tmp_path / "set" / "golden.json").write_text(json.dumps(meta))
    assert parity.main([str(MICRO / "hf"), str(tmp_path / "set")]) == 1
    output = capsys.readouterr().out
    assert "other  the set holds no tensor of this case" in output
    assert "v3_r4/logitz  belongs to no case" in output
    meta["cases"][0].pop("ratio")
    (tmp_path / "set" / "golden.json").write_text(json.dumps(meta))
    assert parity.main([str(MICRO / "hf"), str(tmp_path / "set")]) == 2
    assert "golden.json: case 'v3_r4' has no field 'ratio'\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "4"}, "golden.json: case 'v3_r4' ratio is '4', not int"),
        ({"ratio": 0}, "case 'v3_r4' cannot be planned (compression ratio 0 of a window"),
        ({"frames": "none"}, "tensor input/none of case 'v3_r4' has shape None; the model needs"),
        ({"frames": "small"}, "tensor input/small of case 'v3_r4' has shape (2, 3, 56, 56); the"),
        ({"name": "flat"}, "tensor flat/logits has shape (3,); it must have 2 axes"),
        ({"name": 3}, "golden.json: a case is {'name': 3, "),
    ],
)
def test_a_case_that_cannot_be_run_is_an_error(change, message, tmp_path, capsys):
    tensors = load_file(MICRO / "golden.safetensors")
    tensors["input/small"] = np.zeros((2, 3, 56, 56), np.float32)
    tensors["flat/logits"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "golden.safetensors")
    meta = json.loads((MICRO / "golden.json").read_text())
    meta["cases"][0] |= change
    (tmp_path / "golden.json").write_text(json.dumps(meta))
    assert parity.main([str(MICRO / "hf"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.fixture(scope="module")
def made_set(model, tmp_path_factory):
    """A set of the other kinds of case: drawn frames, thinned tensors, a picture, training."""
    draw = np.random.RandomState(7)
    highest = model.config.language.vocab_size - 12
    prefix, suffix = (draw.randint(0, highest, n).tolist() for n in (3, 4))
    frames = (draw.randint(-128, 128, (4, 3, 112, 112)) / 64).astype(np.float32)

    def encode(frames, model=model):
        return model.encode(frames.transpose(0, 2, 3, 1)[None])[0]

    ids, labels = [*prefix, IMAGE_TOKEN, *suffix], [IGNORE] * 5 + suffix[1:]
    stream = plan_stream(ids, [64], window=160, ratio=[8], labels=labels)
    loss, gradients = loss_and_gradients(model, stream, lambda model: encode(frames, model))
    a_name = "model.layers.1.self_attn.beacon_v_proj.weight"
    directory = tmp_path_factory.mktemp("made")
    save_file(
        {
            "drawn/visual_features": np.asarray(encode(frames))[::5].copy(),
            "input/picture": frames[:3],
            "picture/visual_features": np.asarray(encode(frames[1:3])),
            "train/loss": np.array([loss], np.float32),
            f"train/grad/{a_name}": gradients[a_name],
        },
        directory / "golden.safetensors",
    )
    norms = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
    train = {"name": "train", "window_ratios": [8], "labels": labels, "grad_norms": norms}
    picture = {"name": "picture", "frames": "picture", "modality": "image", "ratio": 4}
    meta = {
        "prefix": prefix,
        "suffix": suffix,
        "frames": {"seed": 7, "n": 4, "size": 112},
        "cases": [{"name": "drawn", "ratio": 4}, picture, train],
    }
    (directory / "golden.json").write_text(json.dumps(meta))
    return directory


def test_drawn_frames_pictures_and_training_cases(made_set, model, capsys):
    assert parity.main([str(MICRO / "hf"), str(made_set)]) == 0
    gradients = len(table_names(model.config))
    assert f"{4 + gradients} tensors, 0 failed" in capsys.readouterr().out


def test_wrong_losses_gradients_and_pictures_fail(made_set, model, tmp_path, capsys):
    tensors = load_file(made_set / "golden.safetensors")
    for name in tensors:
        if not name.startswith("input/"):
            tensors[name] = tensors[name] * np.float32(1.0002)
    save_file(tensors, tmp_path / "golden.safetensors")
    meta = json.loads((made_set / "golden.json").read_text())
    norms = meta["cases"][2]["grad_norms"]
    meta["cases"][2]["grad_norms"] = {name: 1.0002 * norm for name, norm in norms.items()}
    (tmp_path / "golden.json").write_text(json.dumps(meta))
    assert parity.main([str(MICRO / "hf"), str(tmp_path)]) == 1
    output = capsys.readouterr().out
    passed = [line for line in output.splitlines() if line.startswith("ok")]
    # The tower's biases of keys (`compare.ZERO_GRADIENT`), and the last layer's beacon queries.
    assert len(passed) == 5
    assert all(line.endswith("zero but for rounding") for line in passed)
    meta["frames"]["seed"] = 8
    (tmp_path / "golden.json").write_text(json.dumps(meta))
    assert parity.main([str(MICRO / "hf"), str(tmp_path)]) == 2
    assert "the seed does not give the stated prefix" in capsys.readouterr().err


def table_names(config):
    return [name for row in name_rows(config) for name in row.names()]


def test_thinned_tensors_are_compared_with_the_step_that_was_used():
    ours = np.random.default_rng(0).normal(size=(2, 9, 4))
    assert compare_thinned("keys", ours, ours[:, ::7], axis=1).passed
    assert not compare_thinned("keys", ours, ours[:, 1::7], axis=1).passed
    assert compare_thinned("keys", ours, ours[:, :0], axis=1).error == np.inf


@pytest.mark.parametrize("case", ["v23_r2", "v23_r8", "v23_r16", "v23_r8_long"])
@pytest.mark.parametrize("windows_per_group", [None, 1, 2])
def test_language_model_logits(case, windows_per_group, model, language):
    meta, tensors = language
    ratio = next(c["ratio"] for c in meta["cases"] if c["name"] == case)
    suffix = meta["long_suffix" if case.endswith("long") else "suffix"]
    visual = tensors["visual_features"]
    stream = plan_stream(
        [*meta["prefix"], IMAGE_TOKEN, *suffix], [len(visual)], window=160, ratio=ratio
    )
    assert stream.persistent - len(suffix) == tensors[f"{case}/memory_len"][0]
    streams = batch_streams([stream], windows_per_group=windows_per_group)
    logits = np.asarray(nnx.jit(_logits)(model, streams, visual[None]))[0]
    golden = tensors[f"{case}/logits"]
    ours = logits[streams.kind[:, 0].reshape(-1) == 0][-len(golden) :]
    assert compare_tensor(case, ours, golden).passed
    assert (ours.argmax(-1) == golden.argmax(-1)).all()
    assert ours[-1].argmax() == tensors[f"{case}/generated"][0]


def _logits(model, streams, visual):
    return model.logits(model(streams, visual))


def loss_and_gradients(model, stream, visual_of):
    """Mean loss over the targets and all gradients by published name.

    visual_of: function from the model to visual features [V, D].
    """
    graph, params = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params):
        model = nnx.merge(graph, params)
        logits = _logits(model, batch_streams([stream]), visual_of(model)[None])[0]
        rows = np.flatnonzero(stream.target != IGNORE)
        chosen = jax.nn.log_softmax(logits[rows])[np.arange(len(rows)), stream.target[rows]]
        return -chosen.mean()

    loss, gradients = loss_of(params)
    return float(loss), to_published(nnx.to_pure_dict(gradients), model.config)


@pytest.mark.parametrize("case", ["train_r8", "train_step"])
def test_language_model_loss_and_gradients(case, model, language):
    meta, tensors = language
    info = next(c for c in meta["cases"] if c["name"] == case)
    stream = plan_stream(
        [*meta["prefix"], IMAGE_TOKEN, *meta["suffix"]],
        [len(tensors["visual_features"])],
        window=160,
        ratio=info["window_ratios"],
        labels=info["labels"],
    )
    loss, ours = loss_and_gradients(model, stream, lambda model: tensors["visual_features"])
    assert loss == pytest.approx(float(tensors[f"{case}/loss"][0]), rel=1e-5)
    compared = [name for name in tensors if name.startswith(f"{case}/grad/")]
    assert len(compared) == 4
    for name in compared:
        assert compare_tensor(name, ours[name.split("/grad/")[1]], tensors[name]).passed, name
    assert len(info["grad_norms"]) == 3 * 18 + 4
    for name, norm in info["grad_norms"].items():
        assert np.linalg.norm(ours[name]) == pytest.approx(norm, rel=1e-4), name


LLAVA = ("llava_micro", "llava_geom384", "llava_slowfast", "llava_preprocess")


@pytest.mark.parametrize("folder", ["micro", "geom336", *LLAVA])
def test_shared_golden_sets(folder, shared, capsys):
    golden = shared / "golden" / folder
    assert parity.main([str(golden)]) == 0, capsys.readouterr().out


def test_the_table_covers_every_parameter_once():
    for config in (tiny(), tiny(language=_tied(tiny()))):
        model = nnx.eval_shape(lambda config=config: VideoXL(config, rngs=nnx.Rngs(0)))
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
        assert sorted(paths) == sorted(row.ours for row in name_rows(config))
        names = table_names(config)
        assert len(names) == len(set(names))


def _tied(config):
    from dataclasses import replace

    return replace(config.language, tie_embeddings=True)


def test_layouts_are_inverses():
    rng = np.random.default_rng(0)
    for row in name_rows(tiny()):
        shape = (16, 3, 14, 14) if "patch" in row.theirs else (5, 7)
        x = rng.normal(size=shape)
        np.testing.assert_array_equal(row.layout.to_theirs(row.layout.to_ours(x)), x)


def test_7b_shapes_by_abstract_evaluation():
    """The preset has the published sizes; nothing is allocated."""
    model = nnx.eval_shape(lambda: VideoXL(VideoXLConfig(), rngs=nnx.Rngs(0)))
    flat = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert flat[("language", "embed", "embedding")] == (152064, 3584)
    assert flat[("language", "layers", "attention", "beacon_k", "kernel")] == (28, 3584, 512)
    assert flat[("language", "layers", "mlp", "gate", "kernel")] == (28, 3584, 18944)
    assert flat[("vision", "layers", "up", "kernel")] == (23, 1024, 4096)
    assert flat[("projector", "down", "kernel")] == (3584, 3584)
    sizes = {part: 0 for part in ("vision", "projector", "language")}
    for path, shape in flat.items():
        sizes[path[0]] += int(np.prod(shape))
    assert sizes["projector"] == 16_522_240
    beacon = 28 * (3584 + 1) * (3584 + 2 * 512) + 3584
    assert sizes["language"] == 7_615_616_512 + beacon


@pytest.fixture
def broken(tmp_path):
    """A copy of the checkpoint and a function that changes its config and tensors."""
    shutil.copytree(MICRO / "hf", tmp_path / "hf")
    shutil.copytree(MICRO / "clip-vision", tmp_path / "clip-vision")

    def change(config=None, tensors=None, remove=()):
        path = tmp_path / "hf" / "config.json"
        values = json.loads(path.read_text())
        values.update(config or {})
        path.write_text(json.dumps({k: v for k, v in values.items() if k not in remove}))
        if tensors is not None:
            path = tmp_path / "hf" / "model.safetensors"
            held = load_file(path)
            tensors(held)
            save_file(held, path)
        return tmp_path / "hf"

    return change


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beacon_pos": "append"}, "beacon_pos is 'append'; only 'interleave' is implemented"),
        ({"beacon_sink_size": 4}, "beacon_sink_size is 4; only 0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"beacon_param": ["q", "k", "v", "o"]}, "beacon_param must be q, k and v"),
        ({"beacon_stride": 80}, "beacon_stride must equal beacon_window"),
        ({"mm_vision_tower": "../nowhere"}, "neither a directory with a config.json"),
        ({"num_attention_heads": 3}, "width 64 is not a multiple of heads 3"),
    ],
)
def test_unusable_configurations_are_refused(config, message, broken):
    with pytest.raises(ValueError, match=message):
        read_config(broken(config))


def test_missing_config_fields_and_files(broken, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: has no field 'vocab_size'"):
        read_config(broken(remove=("vocab_size",)))
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_config(tmp_path / "empty")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        read_config(tmp_path / "hf")


def test_unusable_tensors_are_listed(broken):
    def change(held):
        del held["model.norm.weight"]
        del held["lm_head.weight"]
        held["model.extra.weight"] = np.zeros(3, np.float32)

    with pytest.raises(CheckpointError) as error:
        load_network(broken(tensors=change))
    message = str(error.value)
    assert "missing tensor lm_head.weight" in message
    assert "missing tensor model.norm.weight" in message
    assert "unexpected tensor model.extra.weight in model.safetensors" in message


def test_wrong_shapes_are_listed(broken):
    def change(held):
        for name in ("model.norm.weight", "model.mm_projector.0.bias"):
            held[name] = held[name][:-1].copy()

    with pytest.raises(CheckpointError) as error:
        load_network(broken(tensors=change))
    assert "model.norm.weight has shape (63,), config.json asks for (64,)" in str(error.value)
    assert "model.mm_projector.0.bias has shape (63,)" in str(error.value)


def test_pickle_and_truncated_files_are_refused(broken):
    directory = broken()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_network(directory)
    path.rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle files"):
        load_network(directory)


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert parity.main([str(tmp_path), str(MICRO)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert parity.main([str(MICRO / "hf"), str(tmp_path)]) == 2


def test_prefill_reads_the_last_token_of_each_sample(model, language):
    """Samples of different lengths in one batch give the logits that each gives alone."""
    meta, _ = language
    streams = [
        plan_stream(meta["suffix"], [], window=160, ratio=8),
        plan_stream(meta["long_suffix"], [], window=160, ratio=8),
    ]
    graph, params = nnx.split(model)
    together, memory = prefill(graph, params, batch_streams(streams, None, 1), None, 256)
    assert memory.length.tolist() == [9, 200]
    for i, stream in enumerate(streams):
        alone, _ = prefill(graph, params, batch_streams([stream]), None, 256)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-4, atol=1e-5)
