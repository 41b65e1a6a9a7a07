"""Class files and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.vocabulary import PROMPT_SETS, Vocabulary, known_vocabulary, prompt_set, read_vocabulary


def test_a_class_file_has_synonyms_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(
        "\ufeffperson: man, woman , people\n\n# a comment\npotted plant  # in a pot\n", encoding="utf-8"
    )
    vocabulary = read_vocabulary(str(file), prompt_set("a {}|the {}"))
    assert vocabulary.names == ("person", "potted plant")
    assert vocabulary.sentences()[0][:4] == ["a person", "the person", "a man", "the man"]
    assert vocabulary.sentences()[1] == ["a potted plant", "the potted plant"]


def test_names_may_stand_on_the_command_line() -> None:
    assert read_vocabulary("cat, dog").names == ("cat", "dog")
    assert read_vocabulary("cat").names == ("cat",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("# only a comment\n", "names no class"),
        ("cat\ndog\nCat\n", "'cat' more than once"),
        ("cat: kitten,,puss\n", "empty name"),
        (": kitten\n", "empty name"),
    ],
)
def test_a_bad_class_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_vocabulary(str(file))
    assert "classes.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "error"),
    [("no/such/file", UsageError), ("missing.txt", UsageError), ("", DataError), ("cat,,dog", DataError)],
)
def test_classes_that_are_no_classes(classes: str, error: type[ClipletError]) -> None:
    with pytest.raises(error):
        read_vocabulary(classes)


def test_a_long_list_of_names_is_no_file_name() -> None:
    names = [f"class number {i}" for i in range(100)]
    assert read_vocabulary(",".join(names)).names == tuple(names)
    assert read_vocabulary("cat,st. bernard,truck/lorry").names == ("cat", "st. bernard", "truck/lorry")
    with pytest.raises(UsageError, match="colon"):
        read_vocabulary("person: man, dog")


def test_a_class_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xff\xd8\xff\xe0 jpeg")
    with pytest.raises(DataError, match="UTF-8"):
        read_vocabulary(str(tmp_path / "classes.txt"))


@pytest.mark.parametrize(
    ("names", "count", "some"),
    [
        (
            ("voc", "voc07", "voc12"),
            20,
            {0: "aeroplane", 10: "dining table", 15: "potted plant", 19: "tv monitor"},
        ),
        (("coco", "coco14", "coco17"), 80, {0: "person", 11: "stop sign", 62: "tv", 79: "toothbrush"}),
        (("nus",), 81, {0: "airport", 42: "person", 80: "zebra"}),
    ],
)
def test_known_class_lists_are_in_the_official_order(
    names: tuple[str, ...], count: int, some: dict[int, str]
) -> None:
    for name in names:
        vocabulary = known_vocabulary(name, PROMPT_SETS["ccd"])
        assert len(vocabulary.names) == count
        assert {c: vocabulary.names[c] for c in some} == some
        assert vocabulary.sentences()[0] == [f"a photo of the {some[0]}"]
        assert read_vocabulary(name).names == vocabulary.names
        # VOC and NUS-WIDE are alphabetical as the files spell them.
        assert "coco" in name or list(vocabulary.names) == sorted(vocabulary.names)


def test_a_list_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="voc12"):
        known_vocabulary("voc2012")


def test_a_file_wins_over_a_known_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()
    assert len(read_vocabulary("voc").names) == 20
    (tmp_path / "voc").rmdir()
    (tmp_path / "voc").write_text("voc\n")
    assert read_vocabulary("voc").names == ("voc",)
    assert read_vocabulary("voc,coco").names == ("voc", "coco")


def test_prompt_sets() -> None:
    assert PROMPT_SETS["ccd"].version == 1
    assert prompt_set("photo").sentences("cat") == ["a photo of a cat"]
    assert len(prompt_set("ensemble7").templates) == 7
    assert prompt_set("one {}|two {}").templates == ("one {}", "two {}")
    with pytest.raises(UsageError, match="--prompts ensemble7"):
        prompt_set("ensemble")
    assert prompt_set("a {photo} of {}").sentences("cat") == ["a {photo} of cat"]
    with pytest.raises(UsageError, match="exactly one"):
        prompt_set("{} and {}")


def test_a_vocabulary_survives_json() -> None:
    vocabulary = read_vocabulary("cat, dog", PROMPT_SETS["ensemble7"])
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again.sentences() == vocabulary.sentences()
    assert again.to_json() == vocabulary.to_json()
