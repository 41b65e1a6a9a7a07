"""Labels for other programs: read back by independent means, and others' side-cars left as they were."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliplet.errors import DataError, UsageError
from cliplet.label_writers import parse_formats, write_labels
from cliplet.labels import ErrorRecord, LabelRecord, LabelStore
from cliplet.xmp_sidecar import keywords, merged

CLASSES = ["cat", "dog", "a|b", "ü & <x>"]
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"


def record(path: str, *labels: str) -> LabelRecord:
    scores = np.array([0.1, 1 / 3, 0.25, 0.75], np.float32)
    return LabelRecord(path, 40, 30, labels, scores, "tiny", 0.5)


def store(
    folder: Path, rows: list[LabelRecord], errors: list[ErrorRecord] | None = None, cwd: str = ""
) -> Path:
    run = {
        "schema": 1,
        "fingerprint": {},
        "model": "tiny",
        "classes": CLASSES,
        "thresholds": [0.3, 0.3, 0.2, 0.7],
        "cwd": cwd,
    }
    with LabelStore(folder) as labels:
        labels.begin(run, overwrite=True)
        for n in range(0, len(rows), 2):
            labels.write_part(rows[n : n + 2])
        labels.write_errors(errors or [])
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    rows = [record("ü 1.jpg", "dog", "a|b"), record("=1+2.jpg"), record("s3://b/c.jpg", "ü & <x>")]
    return store(tmp_path / "out", rows, [ErrorRecord("bad, one.jpg", "decode", 'not "an" image')])


# --- tables --------------------------------------------------------------------------------------------------


def test_csv_is_for_spreadsheets(out: Path) -> None:
    (written,) = write_labels(out, ["csv"])
    assert (written.file, written.rows) == (out / "labels.csv", 3)
    data = (out / "labels.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    assert [r["path"] for r in rows] == ["ü 1.jpg", "./=1+2.jpg", "s3://b/c.jpg", "bad, one.jpg"]
    assert [r["labels"] for r in rows] == ["dog|a\\|b", "", "ü & <x>", ""]
    assert [r["error"] for r in rows] == ["", "", "", 'decode: not "an" image']
    assert np.float32(rows[0]["score:dog"]) == np.float32(1 / 3)
    assert rows[3]["score:dog"] == rows[3]["width"] == ""


def test_jsonl_has_every_input_and_exact_scores(out: Path) -> None:
    write_labels(out, ["jsonl"])
    first, second, third, failed = map(json.loads, (out / "labels.jsonl").read_text().splitlines())
    assert first["labels"] == ["dog", "a|b"]
    assert list(first["scores"]) == CLASSES
    assert np.array(list(first["scores"].values()), np.float32).tobytes() == record("x").scores.tobytes()
    assert (second["labels"], third["path"], third["width"]) == ([], "s3://b/c.jpg", 40)
    assert failed == {"path": "bad, one.jpg", "error": {"stage": "decode", "reason": 'not "an" image'}}


def test_coco_annotates_whole_images(out: Path) -> None:
    write_labels(out, ["coco"])
    coco = json.loads((out / "labels.coco.json").read_text())
    assert [c["name"] for c in coco["categories"]] == CLASSES
    assert [c["threshold"] for c in coco["categories"]] == [0.3, 0.3, 0.2, 0.7]
    assert [(i["id"], i["file_name"]) for i in coco["images"]] == [
        (1, "ü 1.jpg"),
        (2, "=1+2.jpg"),
        (3, "s3://b/c.jpg"),
    ]
    found = [(a["id"], a["image_id"], a["category_id"], a["score"]) for a in coco["annotations"]]
    assert found == [(1, 1, 2, 0.33333334), (2, 1, 3, 0.25), (3, 3, 4, 0.75)]
    assert all(a["bbox"] == [0, 0, 40, 30] and a["area"] == 1200 for a in coco["annotations"])


def test_a_folder_without_rows_gives_whole_files(tmp_path: Path) -> None:
    folder = store(tmp_path / "out", [], [ErrorRecord("a.jpg", "read", "gone")])
    write_labels(folder, ["csv", "jsonl", "coco", "xmp"])
    assert json.loads((folder / "labels.coco.json").read_text())["images"] == []
    assert len((folder / "labels.jsonl").read_text().splitlines()) == 1


def test_a_writer_that_fails_leaves_the_old_file(out: Path) -> None:
    write_labels(out, ["csv", "coco"])
    before = {name: (out / name).read_bytes() for name in ("labels.csv", "labels.coco.json")}
    (out / "labels" / "part-000001.parquet").write_bytes(b"damaged")
    for name in ("csv", "coco"):
        with pytest.raises(DataError, match="cannot read"):
            write_labels(out, [name])
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not list(out.glob("*.tmp"))


def test_what_was_asked_is_checked(out: Path, tmp_path: Path) -> None:
    assert parse_formats("csv, JSONL,csv") == ("csv", "jsonl")
    with pytest.raises(UsageError, match="--write exel"):
        parse_formats("csv,exel")
    with pytest.raises(UsageError, match="--xmp-style lightroom"):
        write_labels(out, ["xmp"], xmp_style="lightroom")
    with pytest.raises(DataError, match="no labels in"):
        write_labels(tmp_path, ["csv"])


def test_another_writer_is_waited_for(out: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with LabelStore(out):
            writing = pool.submit(write_labels, out, ["csv"])
            time.sleep(0.2)
            assert not writing.done()
            assert not (out / "labels.csv").exists()
        assert [one.rows for one in writing.result(10)] == [3]


# --- side-cars -----------------------------------------------------------------------------------------------


def subjects(data: bytes) -> list[str]:
    """The keywords, as the standard library's other parser finds them."""
    root = ElementTree.fromstring(data)
    return [li.text or "" for li in root.iterfind(f".//{DC}subject/*/{RDF}li")]


LIGHTROOM = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
   xmp:Rating="3" xmp:Label="a &gt; b&#xA;second line">
   <!-- by hand -->
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Berlin</rdf:li>
     <rdf:li>dog</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject><rdf:Bag><rdf:li>animals|dog</rdf:li></rdf:Bag></lr:hierarchicalSubject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
DARKTABLE = LIGHTROOM.replace(
    b'xmp:Rating="3"', b'darktable:history_end="4" xmlns:darktable="http://darktable.sf.net/"'
)
ODD = [
    b'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description r:about="" z:n=\'a>b\' xmlns:z="u"/></r:RDF>',
    b'<RDF xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><Description><s xmlns="http://purl.org/dc/elements/1.1/"/></Description></RDF>',
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>',
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\r\n <rdf:Description >\r\n  '
    b'<dc:subject xmlns:dc="http://purl.org/dc/elements/1.1/">\r\n   <rdf:Seq/>\r\n  </dc:subject>\r\n </rdf:Description>\r\n</rdf:RDF>',
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:dc="other"><dc:subject/></rdf:Description></rdf:RDF>',
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description/><rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/">'
    b"<dc:subject/></rdf:Description></rdf:RDF>",
    b"\xef\xbb\xbf" + LIGHTROOM,
]


@pytest.mark.parametrize("before", [LIGHTROOM, DARKTABLE, *ODD, None])
def test_labels_are_merged_and_taken_back(before: bytes | None) -> None:
    own = [] if before is None else subjects(before)
    first = merged(before, ["dog", "ü & <x>"])
    assert first is not None
    assert subjects(first) == keywords(first) == own + [n for n in ("dog", "ü & <x>") if n not in own]
    assert merged(first, ["dog", "ü & <x>"]) == first
    second = merged(first, ["cat"])
    assert second is not None
    assert subjects(second) == [*own, "cat"]
    third = merged(second, [])
    assert third is not None
    assert subjects(third) == own
    assert merged(third, []) == third


def test_every_other_byte_stays() -> None:
    after = merged(LIGHTROOM, ["cat", "dog"])
    assert after is not None
    new = b"\n     <rdf:li>cat</rdf:li>"
    assert new in after
    start = after.index(b"<cliplet:labels")
    end = after.index(b"</cliplet:labels>") + len(b"</cliplet:labels>")
    kept = after[: len(after[:start].rstrip())] + after[end:]
    assert kept.replace(new, b"") == LIGHTROOM
    assert merged(after, []) == LIGHTROOM


# What exiftool makes of a side-car of ours when it adds a keyword: a description for each namespace.
EXIFTOOL = b"""<?xml version='1.0' encoding='UTF-8'?>
<x:xmpmeta xmlns:x='adobe:ns:meta/' x:xmptk='Image::ExifTool 12.57'>
<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>

 <rdf:Description rdf:about=''
  xmlns:cliplet='urn:x-cliplet:labels/1.0/'>
  <cliplet:labels>
   <rdf:Bag>
    <rdf:li>cat</rdf:li>
   </rdf:Bag>
  </cliplet:labels>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:dc='http://purl.org/dc/elements/1.1/'>
  <dc:subject>
   <rdf:Bag>
    <rdf:li>cat</rdf:li>
    <rdf:li>by hand</rdf:li>
   </rdf:Bag>
  </dc:subject>
 </rdf:Description>
</rdf:RDF>
</x:xmpmeta>
"""


def test_our_note_is_found_where_another_program_moved_it() -> None:
    after = merged(EXIFTOOL, ["bird"])
    assert after is not None
    assert subjects(after) == ["by hand", "bird"]
    again = merged(after, [])
    assert again is not None
    assert subjects(again) == ["by hand"]


@given(st.lists(st.lists(st.sampled_from(["cat", "dog", "Berlin", "x y", "é"]), unique=True), max_size=5))
def test_foreign_keywords_never_vanish(runs: list[list[str]]) -> None:
    data = LIGHTROOM
    for labels in runs:
        after = merged(data, labels)
        assert after is not None
        data = after
        found = subjects(data)
        assert found[:2] == ["Berlin", "dog"]
        assert set(found) == {"Berlin", "dog", *labels}
        assert len(found) == len(set(found))


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&b;</x:xmpmeta>'
UNREADABLE = [
    (b"", "not whole XML"),
    (b"no xml", "not whole XML"),
    (LIGHTROOM[:600], "not whole XML"),
    (b"<a/>", "not XMP"),
    (BOMB, "DOCTYPE"),
    (LIGHTROOM.decode("utf-8-sig").encode("utf-16"), "UTF-16"),
    (b'<?xml version="1.0" encoding="latin-1"?><a>\xe9</a>', "latin-1"),
    (
        LIGHTROOM.replace(b"<rdf:Bag>\n     <rdf:li>Berlin", b"<rdf:Bag/><rdf:Bag>\n     <rdf:li>Berlin"),
        "twice",
    ),
    (LIGHTROOM.replace(b'xmp:Rating="3"', b'dc:subject="cat"'), "attribute"),
    (
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        b"<rdf:Description><dc:subject>cat</dc:subject></rdf:Description></rdf:RDF>",
        "not a list",
    ),
]


@pytest.mark.parametrize("data, reason", UNREADABLE)
def test_what_cannot_be_read_is_never_overwritten(data: bytes, reason: str, tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"")
    (tmp_path / "a.xmp").write_bytes(data)
    (written,) = write_labels(store(tmp_path / "out", [record(str(image), "cat")]), ["xmp"])
    ((sidecar, told),) = written.failures
    assert sidecar == str(tmp_path / "a.xmp")
    assert reason in told
    assert (tmp_path / "a.xmp").read_bytes() == data


@pytest.mark.parametrize(
    "style, names", [("basename", ["a.xmp", "b.xmp"]), ("full", ["a.jpg.xmp", "b.png.xmp"])]
)
def test_both_naming_styles(
    tmp_path: Path, style: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.png", "c.jpg"):
        (photos / name).write_bytes(b"")
    rows = [record("a.jpg", "cat"), record("b.png", "dog"), record("c.jpg")]
    out = store(tmp_path / "out", rows, cwd=str(photos))
    (written,) = write_labels(out, ["xmp"], xmp_style=style)
    assert sorted(p.name for p in photos.glob("*.xmp")) == names
    assert subjects((photos / names[1]).read_bytes()) == ["dog"]
    assert (written.rows, written.changed, written.failures) == (2, 2, [])
    assert written.skipped == {"the image has no labels and no side-car": 1}
    (again,) = write_labels(out, ["xmp"], xmp_style=style)
    assert (again.rows, again.changed) == (2, 0)


def test_images_without_a_place_for_a_sidecar_are_counted(tmp_path: Path) -> None:
    rows = [record(p, "cat") for p in ("s3://b/a.jpg", f"{tmp_path}/s.tar::a.jpg", f"{tmp_path}/gone.jpg")]
    (written,) = write_labels(store(tmp_path / "out", rows), ["xmp"])
    assert written.skipped == {"the image is remote": 1, "the image is in an archive": 1}
    assert written.failures == [(f"{tmp_path}/gone.xmp", "left as it is: its image is not there any more")]


def test_images_that_would_share_a_sidecar_are_told(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).write_bytes(b"")
    out = store(tmp_path / "out", [record(f"{tmp_path}/a.jpg", "cat"), record(f"{tmp_path}/a.png", "dog")])
    (written,) = write_labels(out, ["xmp"])
    assert [reason for _, reason in written.failures] == [
        "several labelled images would share it: use --xmp-style full"
    ] * 2
    assert not (tmp_path / "a.xmp").exists()
    (written,) = write_labels(out, ["xmp"], xmp_style="full")
    assert written.rows == 2


def test_links_rights_and_odd_names_are_kept(tmp_path: Path) -> None:
    image = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(image)).write_bytes(b"")
    real = tmp_path / "real.xmp"
    real.write_bytes(LIGHTROOM)
    real.chmod(0o600)
    Path(os.fsdecode(image[:-4] + b".xmp")).symlink_to(real)
    out = store(tmp_path / "out", [record(f"{tmp_path}/caf\\xe9.jpg", "cat")])
    (written,) = write_labels(out, ["xmp"])
    assert (written.changed, written.failures) == (1, [])
    assert subjects(real.read_bytes()) == ["Berlin", "dog", "cat"]
    assert real.stat().st_mode & 0o777 == 0o600
    assert Path(os.fsdecode(image[:-4] + b".xmp")).is_symlink()


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_exiftool_reads_and_writes_them(tmp_path: Path) -> None:
    new = merged(None, ["cat", "ü & <x>"])
    assert new is not None
    (tmp_path / "new.xmp").write_bytes(new)
    (tmp_path / "old.xmp").write_bytes(merged(LIGHTROOM, ["cat"]) or b"")

    def asked(name: str) -> dict[str, object]:
        command = ["exiftool", "-j", "-Subject", "-Rating", "-HierarchicalSubject", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        facts: dict[str, object] = json.loads(done.stdout)[0]
        return facts

    assert asked("new.xmp")["Subject"] == ["cat", "ü & <x>"]
    assert asked("old.xmp")["Subject"] == ["Berlin", "dog", "cat"]
    assert asked("old.xmp")["Rating"] == 3
    command = ["exiftool", "-q", "-overwrite_original", "-Subject+=by hand", str(tmp_path / "old.xmp")]
    subprocess.run(command, check=True)
    after = merged((tmp_path / "old.xmp").read_bytes(), ["bird"])
    assert after is not None
    assert subjects(after) == ["Berlin", "dog", "by hand", "bird"]
