"""Reading examples: the three kinds, the three places, and what is said of bad rows."""

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manylora.runs.data_rows import Message
from manylora.runs.sources import Source, read_source
from manylora.types import DataError

PAIR = '{"prompt": "a", "completion": "b"}\n'
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(here, content: str | bytes, name: str = "d.jsonl") -> str:
    (here / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def texts(source: Source) -> list[tuple[str, ...]]:
    return [example.texts for example in source.examples]


def refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        read_source(name)
    return str(caught.value)


def test_prompts_and_completions(here):
    source = read_source(write(here, PAIR + '{"prompt": "", "completion": "é", "id": 3}\n'))
    assert (source.kind, len(source)) == ("prompt/completion", 2)
    assert texts(source) == [("a", "b"), ("", "é")]


def test_texts(here):
    source = read_source(write(here, '{"text": "x"}'))
    assert (source.kind, texts(source)) == ("text", [("x",)])


def test_messages(here):
    source = read_source(write(here, json.dumps({"messages": CHAT})))
    assert source.kind == "messages"
    assert source.examples[0].messages == (Message("user", "q"), Message("assistant", "a"))


def test_lines_are_counted_as_an_editor_does(here):
    content = b"\xef\xbb\xbf" + PAIR.encode() + b"\r\n  \n" + '{"text": "\u2028"}'.encode()
    name = write(here, content.replace(b'"text"', b'"prompt": "p", "completion"'))
    source = read_source(name)
    assert [example.line for example in source.examples] == [1, 4]
    assert source.place(source.examples[1]) == "d.jsonl:4"


WRONG = [
    # (second line, what is said of it)
    ("{", "is not JSON", "column 2"),
    ("[1, 2]", "is a list, not an object", "a row is"),
    ('"text"', "is the string 'text', not an object", "a row is"),
    ("3", "is the number 3, not an object", "a row is"),
    ("null", "is null, not an object", "a row is"),
    ("{}", "is empty", "a row is"),
    ('{"question": "x"}', "has only 'question'", "a row is"),
    ('{"prompt": "a"}', "has no 'completion'", "a row is"),
    ('{"completion": "a"}', "has no 'prompt'", "a row is"),
    ('{"prompt": null, "completion": "a"}', "has no 'prompt'", "a row is"),
    ('{"prompt": "a", "completion": ""}', "'completion' is empty", "nothing to learn"),
    ('{"prompt": 3, "completion": "a"}', "'prompt' is the number 3", "must be a string"),
    ('{"prompt": ["a"], "completion": "a"}', "'prompt' is a list", "must be a string"),
    ('{"prompt": "a", "completion": true}', "'completion' is true", "must be a string"),
    ('{"prompt": "\\ud800", "completion": "a"}', "half of a surrogate", "'prompt'"),
    ('{"prompt": "a", "completion": "b", "text": "c"}', "at once", "prompt/completion and text"),
    ('{"text": "a"}', "is a text row, but line 1 is a prompt/completion row", "one kind"),
    ('{"text": ""}', "is a text row", "one kind"),
    ('{"messages": []}', "is a messages row", "one kind"),
    ("[" * 100_000, "nested too deeply", "a row is"),
    (b'{"text": "\xff"}', "is not UTF-8 text", "byte 11"),
]


@pytest.mark.parametrize(("line", "said", "remedy"), WRONG)
def test_a_bad_line_is_named_with_its_remedy(here, line, said, remedy):
    raw = line.encode() if isinstance(line, str) else line
    text = refusal(write(here, PAIR.encode() + raw + b"\n" + PAIR.encode()))
    assert text.startswith("d.jsonl:2: "), text
    assert said in text and remedy in text, text


WRONG_MESSAGES = [
    ([], "'messages' is an empty list"),
    ("hello", "'messages' is the string 'hello'"),
    ([CHAT[0]], "no turn of role 'assistant'"),
    ([3], "messages[0] is the number 3"),
    ([CHAT[0], {"role": "assistant"}], "messages[1] has no 'content'"),
    ([CHAT[0], {"content": "x"}], "messages[1] has no 'role'"),
    ([CHAT[0], {"role": "assistant", "content": ""}], "messages[1].content is empty"),
    ([CHAT[0], {"role": "assistant", "content": [1]}], "messages[1].content[0] is the number 1"),
    (
        [CHAT[0], {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}],
        "messages[1].content[0] is of type 'image_url'; only text",
    ),
    ([CHAT[0], {"role": "assistant", "content": 3}], "messages[1].content is the number 3"),
    ([CHAT[0], {"role": "", "content": "x"}], "messages[1].role is empty"),
    (
        [*CHAT, {"role": "assistant", "content": "", "tool_calls": [1]}],
        "messages[2].tool_calls is a list; it must be a list of objects",
    ),
    ([*CHAT, {"role": "user", "content": "x", "weight": 0}], "messages[2] has 'weight'"),
    ([*CHAT, {"role": "user", "content": "x", "name": 3}], "messages[2].name is the number 3"),
]


@pytest.mark.parametrize(("messages", "said"), WRONG_MESSAGES)
def test_bad_messages_are_named(here, messages, said):
    good = json.dumps({"messages": CHAT})
    text = refusal(write(here, f"{good}\n{json.dumps({'messages': messages})}\n"))
    assert text.startswith("d.jsonl:2: "), text
    assert said in text, text


def test_a_json_array_is_told_from_json_lines(here):
    assert "one JSON object per line" in refusal(write(here, "[\n" + PAIR + "]\n"))


def test_nothing_there(here):
    (here / "folder.jsonl").mkdir()
    assert "there is no such file" in refusal("none.jsonl")
    assert "is a folder" in refusal("folder.jsonl")
    assert "has no rows" in refusal(write(here, "\n\n"))


def test_parquet(here):
    table = pa.table(
        {"prompt": ["a", "b"], "completion": ["c", "d"], "text": pa.nulls(2, pa.string())}
    )
    pq.write_table(table, "d.parquet")
    source = read_source("d.parquet")
    assert texts(source) == [("a", "c"), ("b", "d")]
    assert source.place(source.examples[1]) == "d.parquet, row 2"


def test_parquet_messages(here):
    pq.write_table(pa.table({"messages": [CHAT]}), "d.parquet")
    assert read_source("d.parquet").examples[0].messages[1] == Message("assistant", "a")


def test_a_bad_parquet_row_and_file(here):
    pq.write_table(pa.table({"text": ["a", ""]}), "d.parquet")
    assert refusal("d.parquet").startswith("d.parquet, row 2: 'text' is empty")
    write(here, "nonsense", "n.parquet")
    assert refusal("n.parquet").startswith("n.parquet: cannot be read as Parquet: ")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_changed_file_gives_its_new_rows_even_at_the_same_time_and_size(here, kind):
    name = f"d.{kind}"

    def save(word: str) -> None:
        if kind == "parquet":
            pq.write_table(pa.table({"text": [word]}), name)
        else:
            write(here, json.dumps({"text": word}), name)
        os.utime(name, (1, 1))

    save("old")
    assert texts(read_source(name)) == [("old",)]
    save("new")
    assert texts(read_source(name)) == [("new",)]


def test_a_hub_dataset_is_asked_for_by_name_and_split(monkeypatch):
    asked = []

    def load_dataset(name: str, *, split: str):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(read_source("org/name")) == [("a",), ("b",)]
    assert read_source("org/name:test").place(read_source("org/name:test").examples[1]) == (
        "org/name:test, row 2"
    )
    assert asked[:2] == [("org/name", "train"), ("org/name", "test")]


def test_without_the_hub_the_error_says_what_to_do(monkeypatch):
    def load_dataset(name: str, *, split: str):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = refusal("org/name")
    assert text.startswith("org/name: cannot load this dataset from the hub: Couldn't reach")
    assert "long story" not in text and ".csv.gz or .parquet, or begin with ./" in text


# --- files of other kinds ---------------------------------------------------------------------


def test_csv(here):
    content = 'prompt,completion,note\r\na,"b\nc",\r\n\r\n"d ""e""",f,x\r\n'
    source = read_source(write(here, b"\xef\xbb\xbf" + content.encode(), "d.csv"))
    assert texts(source) == [("a", "b\nc"), ('d "e"', "f")]
    assert [example.line for example in source.examples] == [2, 5]
    assert source.ignored == ("note",)
    long = "x" * 300_000  # longer than the module's own limit
    assert texts(read_source(write(here, f"text\n{long}\n", "d.csv"))) == [(long,)]


def test_csv_messages_are_json(here):
    cell = json.dumps(CHAT).replace('"', '""')
    source = read_source(write(here, f'messages\n"{cell}"\n', "d.csv"))
    assert source.examples[0].messages == (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,completion\na,b\nc\n", "d.csv:3: has 1 cells; the titles"),
        ("prompt,prompt\na,b\n", "d.csv:1: has two columns 'prompt'"),
        ('prompt,completion\na,"b\nc\n', "d.csv:2: is not CSV"),
        (b"text\n\xff\n", "d.csv:2: is not UTF-8 text"),
        ("question\na\n", "d.csv:2: has only 'question'"),
        ("prompt,completion\na,\n", "d.csv:2: 'completion' is empty"),
        ("prompt,completion\n", "d.csv: has no rows"),
    ],
)
def test_bad_csv_is_named(here, content, said):
    assert refusal(write(here, content, "d.csv")).startswith(said)


@pytest.mark.parametrize(
    ("name", "content"), [("d.jsonl.gz", PAIR), ("d.csv.gz", "prompt,completion\na,b\n")]
)
def test_gzip(here, name, content):
    packed = gzip.compress(content.encode())
    assert texts(read_source(write(here, packed, name))) == [("a", "b")]
    assert refusal(write(here, packed[:-9], name)).startswith(f"{name}: is not a whole gzip file")
    assert refusal(write(here, content, name)).startswith(f"{name}: is not a whole gzip file")


@pytest.mark.parametrize(
    "name",
    ["./d.json", "../x/d.txt", "/d.tsv", "~/d", "d.json", "a/b/c", "org/d.zip", "d.jsonl.zst"],
)
def test_other_local_files_are_refused_by_name_and_never_asked_of_a_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert refusal(name).startswith(f"{name}: of local files .jsonl, .jsonl.gz, .csv,")


def test_binary_columns_and_strange_values_are_called_what_they_are(here):
    pq.write_table(pa.table({"prompt": ["a"], "completion": [b"xyz"]}), "d.parquet")
    assert "row 1: 'completion' is binary data (3 bytes); it must be a string" in refusal(
        "d.parquet"
    )
    pq.write_table(pa.table({"text": pa.array([0], pa.timestamp("s"))}), "d.parquet")
    assert "row 1: 'text' is a datetime" in refusal("d.parquet")


def test_whatever_a_library_raises_is_the_source_s_fault(here, monkeypatch):
    def rows():
        yield {"text": "a"}
        raise RuntimeError("codec went away\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    write(here, "", "d.parquet")
    assert refusal("d.parquet") == "d.parquet: cannot be read as Parquet: codec went away"
    digits = '{"text": ' + "9" * 5000 + "}"
    assert refusal(write(here, digits)).startswith("d.jsonl:1: cannot be read: ")


def test_nulls_of_a_table_are_no_values(here):
    tool = {"type": "function", "function": {"name": "look", "strict": None}}
    calls = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
    ]
    pq.write_table(pa.table({"messages": [calls], "tools": [[tool]]}), "d.parquet")
    (example,) = read_source("d.parquet").examples
    assert example.messages[0] == Message("user", "q")
    assert example.options == {"tools": [{"type": "function", "function": {"name": "look"}}]}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"system": "be"}, "has 'system', which would be left out; put it into messages"),
        ({"images": ["x"]}, "has 'images'"),
        ({"tools": "["}, "'tools' is text that is not JSON"),
        ({"tools": {"a": 1}}, "'tools' is an object; it must be a list of objects"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "may not set 'chat_template'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "may not set 'tokenize'"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list; it must be an object"),
    ],
)
def test_columns_beside_messages_are_checked(here, more, said):
    assert said in refusal(write(here, json.dumps({"messages": CHAT, **more})))


def test_tools_need_messages(here):
    row = {"prompt": "a", "completion": "b", "tools": [{"a": 1}]}
    assert "has 'tools', which only a chat template can use" in refusal(
        write(here, json.dumps(row))
    )
