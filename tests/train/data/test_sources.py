"""Mixtures: which files paths and YAML stand for, and which records of them are used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.data.sources import Source, find_sources, select
from train.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with empty annotation files, which is the working directory."""
    names = ("a.json", "b.json", "c.jsonl", "d.parquet", "deep/er/a.json", "deep/b.json", "no.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*paths: str) -> list[str]:
    """The files that paths stand for."""
    return [str(source.path) for source in find_sources(paths, "media")]


# Files and patterns.


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.json", ["a.json"]),
        ("./deep/../a.json", ["deep/../a.json"]),
        ("c.jsonl", ["c.jsonl"]),
        ("{b,a}.json", ["b.json", "a.json"]),
        ("{a,a}.json", ["a.json", "a.json"]),
        ("{deep/{er/a,b},a}.json", ["deep/er/a.json", "deep/b.json", "a.json"]),
        ("{deep/,}{b,er/a}.jso{n,}", None),  # deep/b.jso
        ("{deep/,}b.json", ["deep/b.json", "b.json"]),
        ("{.,deep}/{b,b}.{json,json}", ["b.json"] * 4 + ["deep/b.json"] * 4),
        ("*.json", ["a.json", "b.json"]),
        ("?.json*", ["a.json", "b.json", "c.jsonl"]),
        ("[b-d].*", ["b.json", "c.jsonl", "d.parquet"]),
        ("**/*.json", ["a.json", "b.json", "deep/b.json", "deep/er/a.json"]),
        ("{deep/**,.}/a.json", ["deep/er/a.json", "a.json"]),
    ],
)
def test_patterns(pattern: str, expected: list[str] | None, folder: Path):
    if expected is None:
        with pytest.raises(DataError, match=r"deep/b\.jso: cannot be read"):
            found(pattern)
    else:
        assert found(pattern) == expected
        absolute = [str(path) for path in map(folder.joinpath, expected)]
        assert found(f"{folder}/{pattern}") == absolute


@pytest.mark.parametrize("name", ["{a,b}.json", "[ab].json", "*.json", "{a}.json", "{a,b.json"])
def test_a_file_of_just_that_name_comes_first(name: str, folder: Path):
    (folder / name).touch()
    assert found(name) == [name]


def test_braces_without_comma_stay(folder: Path):
    for name in ("{a}1.json", "{}1.json", "}1{.json"):
        (folder / name).touch()
        assert found(name.replace("1", "{1,1}")) == [name, name]


def test_long_lists_of_names(folder: Path):
    # Longer than the name of a file may be.
    assert found("{" + ",".join(["a", "b"] * 1000) + "}.json") == ["a.json", "b.json"] * 1000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x.json", "x.json: cannot be read (No such file or directory); check the path"),
        ("{a,x}.json", "x.json: cannot be read (No such file or directory); check the path"),
        ("x*.json", "x*.json: matches no file; check the pattern"),
        ("{a,x*}.json", "x*.json: matches no file; check the pattern"),
        ("dee*", "dee*: matches no file; check the pattern"),
        ("deep", "deep: is a directory; give its files, deep/*.json"),
        ("no.txt", "no.txt: is not one of .json, .jsonl, .parquet, .yaml, .yml"),
        ("*", "no.txt: is not one of .json, .jsonl, .parquet, .yaml, .yml"),
        ("", ".: is a directory; give its files, *.json"),
        ("a\0.json", "a\0.json: cannot be read (No such file or directory); check the path"),
    ],
)
def test_paths_that_stand_for_nothing(pattern: str, message: str, folder: Path):
    with pytest.raises(DataError) as caught:
        find_sources(["a.json", pattern], "media")
    assert str(caught.value) == message


def test_entries_count_the_given_paths(folder: Path):
    (folder / "m.yaml").write_text("datasets: [{json_path: a.json}, {json_path: b.json}]")
    sources = find_sources(["b.json", "*.json", "m.yaml"], "media", allow_outside=True)
    assert [(str(source.path), source.entry) for source in sources] == [
        ("b.json", 0),
        ("a.json", 1),
        ("b.json", 1),
        ("a.json", 2),
        ("b.json", 2),
    ]
    assert all(source.allow_outside for source in sources)
    assert {source.media_root for source in sources} == {Path("media")}


# Mixtures.


def test_a_mixture(folder: Path):
    (folder / "deep" / "m.yml").write_text(
        f"""
        media_root: pictures
        allow_outside_root: true
        datasets:
          - json_path: b.json
            sampling_strategy: first:10%
            weight: 2
          - json_path: {folder}/a.json
            media_root: /elsewhere
            allow_outside_root: false
            weight: 0.5
            repeat: 1
          - json_path: "{{er/a,../b}}.jso[n]"
            sampling_strategy: random:7
            repeat: 2.5
        """.replace("weight: 2\n", "\n").replace("weight: 0.5\n", "\n")
    )
    deep, pictures = Path("deep"), Path("deep/pictures")
    assert find_sources(["a.json", "deep/m.yml"], "media") == [
        Source(Path("a.json"), Path("media")),
        Source(deep / "b.json", pictures, "first:10%", allow_outside=True, entry=1),
        Source(folder / "a.json", Path("/elsewhere"), entry=1),
        Source(deep / "er/a.json", pictures, "random:7", None, 2.5, True, 1),
        Source(deep / "../b.json", pictures, "random:7", None, 2.5, True, 1),
    ]


def test_weights(folder: Path):
    (folder / "m.yaml").write_text(
        "datasets: [{json_path: a.json, weight: 3}, {json_path: '[b].json', weight: 0.5}]"
    )
    weights = [source.weight for source in find_sources(["m.yaml", "m.yaml"], "media")]
    assert weights == [3.0, 0.5, 3.0, 0.5]
    for paths in (["m.yaml", "c.jsonl"], ["c.jsonl", "m.yaml"]):
        with pytest.raises(DataError) as caught:
            find_sources(paths, "media")
        assert str(caught.value) == (
            "c.jsonl: has no weight, but a.json has; give all datasets one or none, in a YAML file"
        )


def test_the_folder_of_a_mixture_is_no_pattern(folder: Path):
    odd = folder / "{a,b}[1]*"
    odd.mkdir()
    (odd / "x.json").touch()
    (odd / "m.yaml").write_text("datasets: [{json_path: '{x,?}.json'}]")
    sources = find_sources([str(odd / "m.yaml")], "media")
    assert [source.path for source in sources] == [odd / "x.json"] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"datasets: [", "m.yaml: is not valid YAML (while parsing a flow node expected the node"),
        (b"a: \xff", "m.yaml: is not valid YAML ('utf-8' codec can't decode byte 0xff"),
        (b"a: 2024-99-99", "m.yaml: is not valid YAML (month must be in 1..12"),
        (b"a: !!python/object:os.x {}", "m.yaml: is not valid YAML (could not determine a"),
        (b"[" * 10_000, "m.yaml: is not valid YAML (maximum recursion depth exceeded"),
    ],
)
def test_files_that_are_not_yaml(content: bytes, message: str, folder: Path):
    (folder / "m.yaml").write_bytes(content)
    with pytest.raises(DataError) as caught:
        find_sources(["m.yaml"], "media")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


STRATEGIES = "all, or first, end or random with :N or :P% (N at least 1, P above 0, at most 100)"

BAD = {
    "": "must hold datasets:, a list of {json_path: FILE}",
    "- json_path: a.json": "must hold datasets:, a list of {json_path: FILE}",
    "{}": "datasets is None; it must be a list of at least one {json_path: FILE}",
    "datasets: []": "datasets is []; it must be a list of at least one {json_path: FILE}",
    "datasets: a.json": "datasets is 'a.json'; it must be a list of at least one {json_path: FILE}",
    "datasets: [a.json]": "datasets[0] is 'a.json'; it must be fields: {json_path: FILE}",
    "datasets: [{json_path: a.json}]\nmedia: x": "media: there is no such field; do you mean "
    "media_root?",
    "datasets: [{json_path: a.json}]\n1: x": "1: there is no such field; there are datasets, "
    "media_root, allow_outside_root?",
    "datasets: [{json_path: a.json}]\nmedia_root: 3": "media_root is 3; it must be a directory",
    "datasets: [{json_path: a.json}]\nallow_outside_root: 1": "allow_outside_root is 1; it must be "
    "true or false",
}

BAD_DATASETS = {
    "weight: 1": "json_path is None; it must be a file or pattern (.json, .jsonl, .parquet)",
    "json_path: [a.json]": "json_path is ['a.json']; it must be a file or pattern "
    "(.json, .jsonl, .parquet)",
    "json_path: ''": "json_path is ''; it must be a file or pattern (.json, .jsonl, .parquet)",
    "json_path: x.json": "json_path: x.json: cannot be read (No such file or directory); check the "
    "path",
    "json_path: x*": "json_path: x*: matches no file; check the pattern",
    "json_path: m.yaml": "json_path: m.yaml: is not one of .json, .jsonl, .parquet",
    "json_path: a.json, sampling_stratgy: all": "sampling_stratgy: there is no such field; do you "
    "mean sampling_strategy?",
    "json_path: a.json, media_root: ": "media_root is None; it must be a directory",
    "json_path: a.json, allow_outside_root: 'no'": "allow_outside_root is 'no'; it must be true or "
    "false",
    "json_path: a.json, weight: 0": "weight is 0; it must be a number above 0",
    "json_path: a.json, weight: true": "weight is True; it must be a number above 0",
    "json_path: a.json, weight: .inf": "weight is inf; it must be a number above 0",
    "json_path: a.json, weight: .nan": "weight is nan; it must be a number above 0",
    "json_path: a.json, weight: ": "weight is None; it must be a number above 0",
    "json_path: a.json, repeat: -1.5": "repeat is -1.5; it must be a number above 0",
    "json_path: a.json, repeat: '2'": "repeat is '2'; it must be a number above 0",
    **{
        f"json_path: a.json, sampling_strategy: {strategy}": f"sampling_strategy is {value!r}; it "
        f"must be {STRATEGIES}"
        for strategy, value in {
            "most": "most",
            "all:5": "all:5",
            "first": "first",
            "first:0": "first:0",
            "end:-1": "end:-1",
            "end:0%": "end:0%",
            "random:100.5%": "random:100.5%",
            "random:1.5": "random:1.5",
            "random:.5%": "random:.5%",
            "First:5": "First:5",
            "'first:5 '": "first:5 ",
            "'first:٣'": "first:٣",
            "{first: 5}": {"first": 5},
            "": None,
        }.items()
    },
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *BAD.items(),
        *(
            ("datasets: [{" + fields + "}]", "datasets[0]." + message)
            for fields, message in BAD_DATASETS.items()
        ),
        (
            "datasets: [{json_path: a.json, weight: 2, repeat: 2}]",
            "datasets[0] has both weight and repeat; use one of them",
        ),
        (
            "datasets: [{json_path: '*.json', weight: 2}]",
            "datasets[0].json_path is '*.json', 2 files, and they cannot share a weight; make each "
            "a dataset",
        ),
        (
            "datasets: [{json_path: a.json, weight: 2}, {json_path: a.json}]",
            "datasets[1] has no weight, but datasets[0] has; give all datasets one or none",
        ),
    ],
)
def test_unusable_mixtures(content: str, message: str, folder: Path):
    (folder / "m.yaml").write_text(content)
    with pytest.raises(DataError) as caught:
        find_sources(["m.yaml"], "media")
    assert str(caught.value) == f"m.yaml: {message}"


def test_all_problems_of_a_mixture_are_in_one_message(folder: Path):
    (folder / "m.yaml").write_text(
        "media_rot: x\ndatasets: [{json_path: x.json, repeat: 0}, 3, {json_path: a.json}, "
        "{json_path: a.json, weight: 1, repeat: 3, x: 1}]"
    )
    with pytest.raises(DataError) as caught:
        find_sources(["m.yaml"], "media")
    assert str(caught.value) == (
        "m.yaml: 7 problems\n"
        "  media_rot: there is no such field; do you mean media_root?\n"
        "  datasets[0].repeat is 0; it must be a number above 0\n"
        "  datasets[0].json_path: x.json: cannot be read (No such file or directory); check the "
        "path\n"
        "  datasets[1] is 3; it must be fields: {json_path: FILE}\n"
        "  datasets[3].x: there is no such field; there are json_path, sampling_strategy, "
        "media_root, weight, repeat, allow_outside_root?\n"
        "  datasets[3] has both weight and repeat; use one of them\n"
        "  datasets[0] has no weight, but datasets[3] has; give all datasets one or none"
    )


# Which records.


@pytest.mark.parametrize(
    ("strategy", "count", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("first:2", 5, [0, 1]),
        ("first:9", 3, [0, 1, 2]),
        ("first:10%", 11, [0, 1]),  # 1.1, rounded up
        ("first:10%", 10, [0]),
        ("first:0.01%", 3, [0]),
        ("first:100%", 3, [0, 1, 2]),
        ("end:2", 5, [3, 4]),
        ("end:9", 3, [0, 1, 2]),
        ("end:34%", 3, [1, 2]),
        ("random:9", 3, [0, 1, 2]),
        ("random:100%", 3, [0, 1, 2]),
        ("random:3", 0, []),
    ],
)
def test_strategies(strategy: str, count: int, expected: list[int]):
    used = select(strategy, count, seed=0)
    assert used.dtype == np.int64
    assert used.tolist() == expected


def test_percentages_are_exact():
    # 0.07 * 100 is 7.000000000000001 in floating point.
    assert len(select("first:7%", 100, 0)) == 7
    assert len(select("first:0.07%", 10_000, 0)) == 7


def test_random_is_the_same_for_a_seed():
    first = select("random:25%", 1000, seed=1)
    assert len(set(first.tolist())) == 250
    assert (np.diff(first) > 0).all()
    assert (first < 1000).all()
    assert first.min() < 50
    assert first.max() > 950
    np.testing.assert_array_equal(first, select("random:250", 1000, seed=1))
    assert (first != select("random:25%", 1000, seed=2)).any()


@pytest.mark.parametrize("strategy", ["some", "first:0", "random:101%", ""])
def test_there_is_no_such_strategy(strategy: Any):
    with pytest.raises(DataError) as caught:
        select(strategy, 3, 0)
    assert str(caught.value) == f"sampling_strategy is {strategy!r}; it must be {STRATEGIES}"


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path):
    """A forgotten dash would lose a dataset."""
    path = tmp_path / "m.yaml"
    path.write_text("datasets:\n  - json_path: a.json\n    json_path: b.json\n")
    with pytest.raises(DataError, match=r"is not valid YAML .*json_path is there twice"):
        find_sources([str(path)], str(tmp_path))
