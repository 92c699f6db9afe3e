"""Text files of every kind: the same texts of the same content, or one line that says where it is not."""

import csv
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wadi.errors import WadiError, WadiWarning
from wadi.tables import SUFFIXES, Prompt, read_rows, read_text, read_texts, text_lines

ODD = ["a red\u2028cat", "a\u0085dog", "a\x0bhill, far", 'a "quoted" bird', "ein Hügel 🚀", "a\x1ctab\there"]


def write(path, texts, end="\n", mark=b""):
    """A file of texts of the kind that its suffix names."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), path)
        return path
    if suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator=end, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([("n", "text"), *enumerate(texts)])
        content = path.read_text(encoding="utf-8")
        content = path.read_bytes().decode()
    elif suffix == ".json":
        content = json.dumps([{"n": i, "text": text} for i, text in enumerate(texts)], ensure_ascii=False)
    elif suffix == ".jsonl":
        rows = [json.dumps({"n": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
        content = "".join(row + end for row in rows)
    else:
        content = end.join(texts) + end
    path.write_bytes(mark + content.encode())
    return path


def texts_of(path, column="text"):
    return [prompt.text for prompt in read_texts(path, column)]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".CSV"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, suffix, end, mark):
    assert texts_of(write(tmp_path / f"p{suffix}", ODD, end, mark)) == ODD


ONE_LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1)


@given(texts=st.lists(ONE_LINE.filter(lambda text: text == text.strip() and text), min_size=1))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".json"])
def test_any_text_survives(tmp_path_factory, suffix, texts):
    path = write(tmp_path_factory.mktemp("texts") / f"p{suffix}", texts)
    expected = [
        text.removeprefix("\ufeff").strip() if i == 0 and suffix == ".txt" else text
        for i, text in enumerate(texts)
    ]
    assert texts_of(path) == [text for text in expected if text]


def test_lines_end_as_in_editors():
    assert text_lines("a\nb\r\nc\rd\u2028e\n") == ["a", "b", "c", "d\u2028e"]
    assert text_lines("a\n\n") == ["a", ""]
    assert text_lines("") == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_rows_without_a_text_are_skipped_and_counted(tmp_path, suffix):
    path = write(tmp_path / f"p{suffix}", ["a cat", None, "a dog", None])
    with pytest.warns(WadiWarning, match=r"2 of 4 rows have no text in 'text'; they are skipped"):
        assert texts_of(path) == ["a cat", "a dog"]


def test_json_holds_texts_objects_or_captions_of_coco(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a cat", " a dog "]))
    assert read_texts(path, "any") == [Prompt("a cat", 1), Prompt("a dog", 2)]
    rows = [{"id": 2, "image_id": 7, "caption": "late"}, {"id": 1, "image_id": 7, "caption": "a  cat\n"}]
    path.write_text(json.dumps({"images": [], "annotations": rows}))
    assert texts_of(path, "any") == ["a cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a cat".encode("utf-16"), "is UTF-16 text.*save it as UTF-8"),
        ("p.csv", "text\na".encode("utf-16-be"), "line 1 holds a NUL byte"),
        ("p.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"not UTF-8 text \(line 2"),
        ("p.csv", b"text\na\0b\n", "line 2 holds a NUL byte"),
        (
            "p.csv",
            b"text\na dog, red\n",
            "line 2 has 2 cells and the header 1; put a cell that holds a comma",
        ),
        ("p.tsv", b"text\na dog\tred\n", "line 2 has 2 cells and the header 1; put a cell that holds a tab"),
        ("p.csv", b"text,n\na\n", "line 2 has 1 cells and the header 2"),
        ("p.csv", b'text,n\n"a cat,1\na dog,2\n', "line 2 has 1 cells and the header 2"),
        ("p.csv", b'text\n"a" cat\n', "row that begins on line 2 cannot be read"),
        ("p.csv", b"text,text\na,b\n", "names the column 'text' twice"),
        ("p.csv", b"a cat\na dog\n", "no column 'text' but a cat.*first line of a .csv names"),
        ("p.csv", b"id;text\n1;a\n", "no column 'text' but id;text"),
        ("p.jsonl", b'["a"]\n', "line 1: has no columns, it is no JSON object"),
        ("p.jsonl", b'[\n{"text": "a"}\n]', "line 1 is not valid JSON.*is it a .json file"),
        ("p.jsonl", b'{"text": "a"}\n{"other": 1}', "line 2: has no column 'text' but other"),
        ("p.jsonl", b'{"text": "\\ud800"}', "half of a character"),
        ("p.json", b'{"text": "a"}', "neither a list of texts or of objects, nor COCO"),
        ("p.json", b'[["a"]]', "neither a list"),
        ("p.json", b'["a", 3]', "row 2: the prompt must be text, but is 3"),
        ("p.json", b"[" * 99999, "not valid JSON"),
        ("p.json", b'{"annotations": [{"id": 1}]}', "not COCO"),
        ("p.parquet", b"", "parquet"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WadiError, match=message) as error:
        read_texts(tmp_path / name, "text")
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [2, 6000])
@pytest.mark.parametrize("after", [[], ['"a bird, red"'], ['"a stray one', "the end"]])
def test_a_quote_that_nothing_closes_ends_with_its_line(tmp_path, rows, after):
    others = [f"a cat on hill {i}" for i in range(rows)]
    (tmp_path / "p.csv").write_text(
        "\n".join(["text", "a dog", '"masterpiece, a cat', *others, *after]) + "\n"
    )
    with pytest.warns(WadiWarning, match="line 3 opens a double quote that nothing closes"):
        found = texts_of(tmp_path / "p.csv")
    assert found == ["a dog", "masterpiece, a cat", *others, *(text.strip('"') for text in after)]


def test_rows_say_on_which_line_they_begin(tmp_path):
    (tmp_path / "p.csv").write_text('text,n\n"two\nlines",1\n\n  \na,2\n')
    rows = list(read_rows(tmp_path / "p.csv"))
    assert rows == [(2, {"text": "two\nlines", "n": "1"}), (6, {"text": "a", "n": "2"})]


def test_missing_files_are_named(tmp_path):
    for suffix in SUFFIXES:
        if suffix != ".parquet":
            with pytest.raises(WadiError, match=rf"none\{suffix}: could not read the file: No such file"):
                read_texts(tmp_path / f"none{suffix}", "text")
    with pytest.raises(WadiError, match="could not read"):
        read_text(tmp_path)


def test_good_files_are_read_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        (tmp_path / "p.csv").write_text(' text ,n\n"a ""red"" dog, big",1,\na 5" nail,2\n')
        assert texts_of(tmp_path / "p.csv") == ['a "red" dog, big', 'a 5" nail']
