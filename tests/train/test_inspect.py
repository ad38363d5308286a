"""`python -m train.inspect_data`: its figures, pictures, bad samples and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.data import assert_png
from train.inspect.figures import statistics
from train.inspect_data import main
from vxl_jax.media import probe_video
from vxl_jax.text.chat import encode_conversation

CONFIG = """
from train.config import DataSection, ModelSection, OptimSection, RunSection, TrainConfig

CONFIG = TrainConfig(
    model=ModelSection(preset="demo", tokenizer="{run_dir}/data/tokenizer"),
    data=DataSection(
        train_json=("{run_dir}/data/train.json",),
        media_root="{run_dir}/data/media",
        min_tiles=1,
        batch_size=3,
        shapes=3,
        workers=0,
    ),
    optim=OptimSection(accumulate=2),
    run=RunSection(run_dir="RUN_DIR"),
)
"""


@pytest.fixture
def run(demo_data: Path, tmp_path: Path) -> Path:
    """A run's directory with separate data, and `config.py` for it."""
    shutil.copytree(demo_data, tmp_path / "run" / "data")
    text = CONFIG.replace("RUN_DIR", str(tmp_path / "run"))
    (tmp_path / "config.py").write_text(text)
    return tmp_path / "run"


def inspect(run: Path, *options: str) -> int:
    return main(["--config", str(run.parent / "config.py"), *options])


def summary(run: Path, out: str = "inspect") -> Any:
    return json.loads((run / out / "summary.json").read_text())


def bad_rows(run: Path) -> list[dict[str, str]]:
    text = (run / "inspect" / "bad_samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def records(run: Path, file: str = "train.json") -> list[dict[str, Any]]:
    return json.loads((run / "data" / file).read_text())


def lengths_of(record: dict[str, Any], media: Path, tokenizer: Any) -> tuple[str, int, int, int]:
    """Kind, tokens of text, labelled ones, and frames, from the record and its files alone."""
    encoded = encode_conversation(record["conversations"], tokenizer)
    labels = int((encoded.labels != -100).sum())
    if "video" in record:
        frames = probe_video(media / record["video"]).frames
        return "video", len(encoded.ids) - 1, labels, frames
    files = record.get("image", [])
    files = [files] if isinstance(files, str) else files
    tiles = [Image.open(media / file).size for file in files]
    kind = ("text", "image", "images")[min(len(files), 2)]
    return kind, len(encoded.ids) - len(files), labels, sum(w * h // 56**2 for w, h in tiles)


def test_figures_and_pictures(
    run: Path, demo_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are those that follow from records and files; what is printed is in summary.json."""
    assert inspect(run, "--samples", "5") == 0
    found = summary(run)
    rows = [lengths_of(r, run / "data/media", demo_tokenizer) for r in records(run)]
    kinds, text, labels, frames = (list(column) for column in zip(*rows, strict=True))
    # 4 tokens a frame, and at the lowest ratio, 4, a beacon for each 4.
    tokens = np.array(text) + 5 * np.array(frames)
    (source,) = found["sources"]
    assert source["file"] == str(run / "data/train.json")
    expected = {"records": len(rows), "used": len(rows), "good": len(rows), "bad": 0, "epochs": 1}
    assert source == source | expected
    assert {k: n for k, n in source["kinds"].items() if n} == Counter(kinds)
    assert len(set(kinds)) == 4
    assert source["tokens"] == tokens.sum()
    assert source["tokens_an_epoch"] == pytest.approx(tokens.sum())

    lengths = found["lengths"]
    assert lengths["tokens"] == {
        "min": tokens.min(),
        "median": np.median(tokens),
        "mean": pytest.approx(tokens.mean()),
        "p95": pytest.approx(np.percentile(tokens, 95)),
        "max": tokens.max(),
        "sum": tokens.sum(),
    }
    assert lengths["text"]["sum"] == sum(text)
    assert lengths["visual"]["sum"] == 4 * sum(frames)
    assert lengths["beacons"]["sum"] == sum(frames)
    assert lengths["labelled"]["sum"] == sum(labels)
    assert lengths["frames"]["min"] == min(f for f in frames if f)
    assert lengths["labelled_share"] == pytest.approx(sum(labels) / tokens.sum())
    videos = [t for t, kind in zip(tokens, kinds, strict=True) if kind == "video"]
    assert lengths["by_kind"]["video"]["tokens"] == statistics(np.array(videos))

    (epoch,) = found["epochs"]
    assert (epoch["first"], epoch["last"], epoch["samples"]) == (1, 1, len(rows))
    assert epoch["tokens"] == tokens.sum()
    # Every sample goes into the smallest bucket with or without media that holds it.
    places = Counter()
    for length, count in zip(tokens, frames, strict=True):
        ends = [b["tokens"] for b in found["buckets"] if (b["frames"] > 0) == (count > 0)]
        places[min(end for end in ends if end >= length), count > 0] += 1
    batches = room = 0
    for bucket in found["buckets"]:
        count = places[bucket["tokens"], bucket["frames"] > 0]
        assert (bucket["samples"], bucket["batches_run"]) == (count, -(-count // 3))
        batches += -(-count // 3)
        room += -(-count // 3) * 3 * bucket["tokens"]
    assert epoch["batches"] == found["run"]["batches"] == batches
    assert epoch["padded_share"] == pytest.approx(1 - tokens.sum() / room)
    assert found["run"]["padded_share"] == pytest.approx(1 - tokens.sum() / room)
    assert found["run"]["steps"] == found["run"]["last_step"] == -(-batches // 2)
    assert found["bad"]["count"] == 0
    assert found["media_checked"] is None

    printed = capsys.readouterr().out
    for number in (f"{tokens.sum():,}", f"{batches} batches", f"{sum(labels):,}", "no bad samples"):
        assert number in printed
    assert_png(run / "inspect/lengths.png", (1000, 2000), (800, 3000))
    assert_png(run / "inspect/samples.png", (1500, 1700), (500, 1500))
    assert bad_rows(run) == []
    assert not list((run / "inspect").glob("*.part"))


def test_lessons_and_held_out_questions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data files one after the other; a held-out file is counted too."""
    files = [str(run / "data" / name) for name in ("frames.json", "train.json")]
    options = ["--data.train-json", *files, "--data.epochs", "2", "3", "--data.sequential", "True"]
    heldout = str(run / "data/heldout.json")
    options += ["--data.eval-json", heldout, "--run.max-steps", "7", "--samples", "0"]
    assert inspect(run, *options, "--out", str(run / "here")) == 0
    found = summary(run, "here")
    counts = [len(records(run, name)) for name in ("frames.json", "train.json", "heldout.json")]
    assert [(e["first"], e["last"], e["samples"]) for e in found["epochs"]] == [
        (1, 2, counts[0]),
        (3, 5, counts[1]),
    ]
    assert found["run"]["samples"] == 2 * counts[0] + 3 * counts[1]
    assert found["run"]["batches"] == sum(
        (e["last"] - e["first"] + 1) * e["batches"] for e in found["epochs"]
    )
    assert found["run"]["last_step"] == 7
    assert "run.max_steps stops it after 7" in capsys.readouterr().out
    assert [(row["file"], row["good"]) for row in found["heldout"]] == [(heldout, counts[2])]
    assert not (run / "here/samples.png").exists()
    assert not (run / "inspect").exists()


def test_records_of_other_trainers_are_counted_by_their_kind(run: Path) -> None:
    """The same data with the names of LLaMA-Factory has the same figures."""
    assert inspect(run, "--samples", "0") == 0
    before = summary(run)
    roles = {"human": "user", "gpt": "assistant"}
    others: list[dict[str, Any]] = []
    for record in records(run):
        mark = "<video>" if "video" in record else "<image>"
        turns = [
            {"role": roles[t["from"]], "content": t["value"].replace("<image>", mark)}
            for t in record["conversations"]
        ]
        other: dict[str, Any] = {"messages": turns, "images": [], "videos": [], "system": ""}
        for name in ("image", "video"):
            files = record.get(name, [])
            other[f"{name}s"] = [files] if isinstance(files, str) else files
        others.append(other)
    (run / "data/train.json").write_text(json.dumps(others))
    assert inspect(run, "--samples", "0") == 0
    found = summary(run)
    for name in ("sources", "lengths", "epochs", "buckets", "bad"):
        assert found[name] == before[name], name
    assert found["sources"][0]["kinds"]["video"] > 0
    assert found["bad"]["count"] == 0


def test_check_media(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated image and a missing one are named, with status 1; a file listed twice is decoded
    once.
    """
    media = run / "data/media"
    with_image = [r for r in records(run) if isinstance(r.get("image"), str)]
    cut, gone = list(dict.fromkeys(r["image"] for r in with_image))[:2]
    content = (media / cut).read_bytes()
    (media / cut).write_bytes(content[: len(content) // 2])
    (media / gone).unlink()

    def users(file: str) -> int:
        return sum(file in (r.get("image") or []) for r in records(run))

    train = str(run / "data/train.json")
    options = ["--data.train-json", train, train, "--data.workers", "2", "--samples", "0"]
    assert inspect(run, *options) == 0  # nothing is decoded, missing files do no harm
    assert "training would stop" not in capsys.readouterr().out
    assert {row["reason"].partition(": ")[0] for row in bad_rows(run)} == {str(media / gone)}

    assert inspect(run, *options, "--check-media") == 1
    rows = {row["name"]: row["reason"] for row in bad_rows(run)}
    assert len(rows) == users(cut) + users(gone)
    assert sum("image cannot be decoded" in reason for reason in rows.values()) == users(cut)
    printed = capsys.readouterr().out
    for name, reason in rows.items():
        assert name.startswith(f"{train}[")
        assert f"  {name}: {reason}" in printed
    checked = summary(run)["media_checked"]
    with_media = sum("image" in r or "video" in r for r in records(run))
    assert checked["samples"] == with_media - users(gone)
    assert checked["bad"] == users(cut)
    assert summary(run)["bad"]["count"] == len(rows)
    assert [g["count"] for g in summary(run)["bad"]["reasons"]] == sorted(
        (users(cut), users(gone)), reverse=True
    )


def test_all_media_are_good(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0, and the data are not touched."""
    before = sorted(path.stat().st_mtime_ns for path in (run / "data/media").rglob("*"))
    assert inspect(run, "--check-media", "--samples", "0") == 0
    assert ": 0 bad\nno bad samples\n" in capsys.readouterr().out
    assert before == sorted(path.stat().st_mtime_ns for path in (run / "data/media").rglob("*"))


def test_bad_sample_on_the_sheet(run: Path) -> None:
    """A sample whose image cannot be decoded has a row with the reason, and is listed."""
    for path in (run / "data/media").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    assert inspect(run, "--samples", "16") == 0
    assert len(bad_rows(run)) == 8  # four of image and four of images
    assert all("cannot be decoded" in row["reason"] for row in bad_rows(run))
    assert_png(run / "inspect/samples.png", (1500, 1700), (1500, 3000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "65"], "--samples is 65; it must be between 0 and 64"),
        (["--samples", "-1"], "--samples is -1; it must be between 0 and 64"),
        (["--samples", "many"], "argument --samples: invalid int value: 'many'"),
        (["--out"], "argument --out: expected one argument"),
        (["--check_midia"], "there is no option --check-midia; did you mean --check-media?"),
        (["--data.max-frame", "3"], "there is no option --data.max-frame; did you mean --data"),
        (["--data.train-json", "/no.json"], "/no.json: cannot be read"),
        (["--model.tokenizer", "/no"], "model.tokenizer /no: there is no such directory"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: cannot be made"),
    ],
)
def test_refusals(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, and status 2."""
    try:
        status: Any = inspect(run, *options)
    except SystemExit as error:
        status = error.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


def test_no_usable_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in training, a file of which nothing can be used is an error."""
    (run / "data/train.json").write_text('[{"id": "a"}, 5]')
    assert inspect(run) == 2
    assert "none of its 2 records can be used" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--check-media", "--samples", "--out", "--data.train-json"):
        assert option in printed


def test_interrupted(run: Path) -> None:
    """Ctrl-C: status 130, one line, and no process is left."""
    frame = Image.new("RGB", (56, 56))
    folder = run / "data/media/long"
    folder.mkdir()
    for i in range(100):
        frame.save(folder / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": i, "video": "long", "conversations": turns} for i in range(3000)]
    (run / "data/train.json").write_text(json.dumps(rows))
    options = ["--config", str(run.parent / "config.py"), "--data.workers", "1", "--samples", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.inspect_data", *options, "--check-media"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    while not process.stdout.readline().startswith("run: "):
        assert process.poll() is None
    while not (children := _children(process.pid)):  # decoding has begun
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid: int) -> list[str]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    return found
