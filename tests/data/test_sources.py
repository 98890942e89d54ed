"""Local formats against what was written, the hub against a stand-in, every error sentence."""

import gzip
import json
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from huggingface_hub.errors import HTTPError
from pyarrow import parquet

from lpdeploy.data.rows import Example, Message
from lpdeploy.data.sources import (
    HUB_SOURCES,
    Corpus,
    compute_source_hash,
    load_corpus,
)
from lpdeploy.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} is absent")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return str(path)


def write_rows(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def texts(source, **options):
    return [example.text for example in load_corpus(source, **options).examples]


PAIR = {"instruction": "Add the numbers.", "input": "2 3", "output": "5"}
CHAT = Example(messages=(Message("user", "Add the numbers.\n\n2 3"), Message("assistant", "5")))
CHAT_WITHOUT_INPUT = Example(
    messages=(Message("user", "Add the numbers."), Message("assistant", "5"))
)


class TestText:
    @pytest.mark.parametrize("suffix", [".txt", ".raw", ".text", ".tokens", ".TXT"])
    def test_documents_are_split_at_the_separator_line(self, tmp_path, suffix):
        content = (
            "one\n\nstill one\n<|endoftext|>\ntwo <|endoftext|> inside\n<|endoftext|>\nthree\n"
        )
        assert texts(write(tmp_path / f"a{suffix}", content)) == [
            "one\n\nstill one",
            "two <|endoftext|> inside",
            "three",
        ]

    def test_whitespace_of_a_document_stays(self, tmp_path):
        assert texts(write(tmp_path / "a.txt", " \n = Title = \n \n")) == [" \n = Title = \n "]

    def test_windows_line_ends_and_byte_order_mark(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
        assert texts(str(path)) == ["one", "two"]

    def test_empty_documents_are_skipped(self, tmp_path):
        content = "<|endoftext|>\n<|endoftext|>\n \n<|endoftext|>\none\n<|endoftext|>\n"
        assert texts(write(tmp_path / "a.txt", content)) == ["one"]

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"caf\xe9 noir")
        with pytest.raises(DataError, match=r"a\.txt' is not UTF-8 .*Convert it to UTF-8\."):
            load_corpus(str(path))

    def test_unreadable(self, tmp_path):
        (tmp_path / "a.txt").mkdir()
        with pytest.raises(DataError, match=r"a\.txt' is no regular file"):
            load_corpus(str(tmp_path))


class TestJson:
    def test_lines(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", "url": "x"}])
        assert load_corpus(path) == Corpus(path, [Example("one"), Example("two")])

    def test_blank_lines_and_unicode_line_separators(self, tmp_path):
        content = '{"text": "a\u2028b"}\n\n{"text": "c"}\n'
        assert texts(write(tmp_path / "a.jsonl", content)) == ["a\u2028b", "c"]

    def test_array(self, tmp_path):
        path = write(tmp_path / "a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
        assert texts(path) == ["one", "two"]

    def test_lines_in_a_json_file(self, tmp_path):
        assert texts(write_rows(tmp_path / "a.json", [{"text": "one"}, {"text": "two"}])) == [
            "one",
            "two",
        ]

    def test_bad_line(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": }\n')
        expected = re.escape(f"'{path}', line 3, is not valid JSON (Expecting value). Write one")
        with pytest.raises(DataError, match=expected):
            load_corpus(path)

    def test_bad_array(self, tmp_path):
        path = write(tmp_path / "a.json", '[{"text": "one"},\n{"text"}]\n')
        with pytest.raises(DataError, match=r"line 2, is not valid JSON .*one list of objects\."):
            load_corpus(path)

    @pytest.mark.parametrize(
        ("rows", "where"), [("%s\n%s\n", "line 2,"), ("[%s,\n\n%s]", "row 2,")]
    )
    def test_row_without_fields(self, tmp_path, rows, where):
        path = write(tmp_path / "a.json", rows % ('{"text": "a"}', '{"body": "b", "id": 1}'))
        expected = (
            f"'{path}', {where} has the fields body, id. Rename them to 'text', to "
            "'messages', or to 'instruction' (and 'input') with 'response' or 'output'."
        )
        with pytest.raises(DataError, match=re.escape(expected)):
            load_corpus(path)


class TestInstructions:
    @pytest.mark.parametrize("answer", ["output", "response"])
    def test_pair(self, tmp_path, answer):
        row = {"instruction": PAIR["instruction"], "input": PAIR["input"], answer: "5"}
        corpus = load_corpus(write_rows(tmp_path / "a.jsonl", [row]))
        assert corpus.examples == [CHAT]
        assert corpus.is_chat

    def test_empty_responses_are_skipped(self, tmp_path):
        rows = [PAIR, {**PAIR, "output": " "}, {**PAIR, "output": None}]
        assert len(load_corpus(write_rows(tmp_path / "a.jsonl", rows)).examples) == 1

    def test_plain_text_is_no_instruction(self, tmp_path):
        assert not load_corpus(write_rows(tmp_path / "a.jsonl", [{"text": "a"}])).is_chat

    def test_mixture(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", [PAIR, {"text": "a"}])
        with pytest.raises(DataError, match=r"mixes plain text and conversations\. Put them"):
            load_corpus(path)


class TestParquet:
    def test_rows(self, tmp_path):
        rows = [{"text": f"document {i}", "id": i} for i in range(2500)]
        path = write_parquet(tmp_path / "a.parquet", rows)
        assert texts(path) == [row["text"] for row in rows]

    def test_pairs(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", [{**PAIR, "source": "x"}])
        assert load_corpus(path).examples == [CHAT]

    def test_row_without_fields(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", [{"body": "b"}])
        with pytest.raises(DataError, match=r"a\.parquet', row 1, has the fields body\. Rename"):
            load_corpus(path)

    def test_damaged(self, tmp_path):
        path = write(tmp_path / "a.parquet", "PAR1 is how a parquet file begins")
        with pytest.raises(DataError, match=r"is no readable parquet file .*Copy it anew\."):
            load_corpus(path)


class TestFolder:
    def test_files_are_read_in_order(self, tmp_path):
        write(tmp_path / "b.txt", "two\n<|endoftext|>\nthree")
        write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
        write_parquet(tmp_path / "c.parquet", [{"text": "four"}])
        write(tmp_path / "README.md", "not data")
        assert texts(str(tmp_path)) == ["one", "two", "three", "four"]

    def test_without_data(self, tmp_path):
        write(tmp_path / "README.md", "not data")
        with pytest.raises(DataError, match=r"holds no data file\. Put \.txt, .*\.parquet files"):
            load_corpus(str(tmp_path))

    def test_unknown_suffix(self, tmp_path):
        path = write(tmp_path / "a.csv", "text\none\n")
        with pytest.raises(DataError, match=r"has the suffix '\.csv', .* Use \.txt, .*\.parquet\."):
            load_corpus(path)

    @pytest.mark.parametrize("content", ["", " \n\n", "\n<|endoftext|>\n"])
    def test_nothing_usable(self, tmp_path, content):
        path = write(tmp_path / "a.txt", content)
        with pytest.raises(DataError, match=r"a\.txt' holds no text: .* Give another source\."):
            load_corpus(path)


class TestUnknownName:
    def test_near_short_name(self):
        with pytest.raises(
            DataError,
            match=r"called 'wikitxt2'\. Did you mean 'wikitext2'\? Give a path, one of "
            r"wikitext2, ptb, c4, lamini, alpaca, or a hub name owner/name\.",
        ):
            load_corpus("wikitxt2")

    def test_near_file(self, tmp_path):
        there = write(tmp_path / "valid.txt", "a")
        with pytest.raises(DataError, match=re.escape(f"Did you mean '{there}'?")):
            load_corpus(str(tmp_path / "vali.txt"))

    @pytest.mark.parametrize("name", ["qqqqqqqq", "data/missing.txt", "/no/such/folder", "a/b/c"])
    def test_nothing_near(self, name):
        with pytest.raises(DataError, match=f"is called '{name}'. Give a path"):
            load_corpus(name)


class StandIn:
    """The hub: repositories are folders laid out as the real ones, `calls` is what was asked."""

    def __init__(self, folder, load):
        self.folder = folder
        self.load = load
        self.calls = []
        self.error = None

    def put(self, name, rows):
        path = self.folder / "repositories" / name
        if path.suffix == ".parquet":
            write_parquet(path, rows)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)

    def put_card(self, repository, configs):
        lines = ["---", "configs:"]
        for config, pattern in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in ("train", "validation", "test"):
                lines += [f"  - split: {split}", f"    path: {pattern.format(split=split)}"]
        write(self.folder / "repositories" / repository / "README.md", "\n".join([*lines, "---"]))

    def load_dataset(self, path, *, revision=None, **options):
        self.calls.append({"path": path, "revision": revision, **options})
        if self.error:
            raise self.error
        local = self.folder / "repositories" / path
        return self.load(str(local), cache_dir=str(self.folder / "cache"), **options)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    stand_in = StandIn(tmp_path / "hub", datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # a local folder named c4 would win over the hub
    return stand_in


class TestHub:
    def test_wikitext2_is_one_document(self, hub):
        lines = ["", " = Title = \n", " Text . \n", "", " More . \n"]
        for config in ("wikitext-2-raw-v1", "wikitext-103-v1"):
            for split in ("train", "validation", "test"):
                rows = [{"text": f"{line}{split}"} for line in lines]
                if (config, split) == ("wikitext-2-raw-v1", "test"):
                    rows = [{"text": line} for line in lines]
                hub.put(f"Salesforce/wikitext/{config}/{split}-00000-of-00001.parquet", rows)
        hub.put_card(
            "Salesforce/wikitext",
            {
                "wikitext-103-v1": "wikitext-103-v1/{split}-*",
                "wikitext-2-raw-v1": "wikitext-2-raw-v1/{split}-*",
            },
        )
        assert texts("wikitext2", split="test") == [
            "\n\n = Title = \n\n\n Text . \n\n\n\n\n More . \n"
        ]

    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_ptb_is_one_document(self, hub, split):
        for name in ("train", "validation", "test"):
            rows = [{"sentence": "no it was n't"}, {"sentence": f"<unk> N years {name}"}]
            hub.put(f"ptb-text-only/ptb_text_only/penn_treebank/{name}/0000.parquet", rows)
        assert texts("ptb", split=split) == [f"no it was n't <unk> N years {split}"]
        assert hub.calls[0]["revision"] == "refs/convert/parquet"

    @pytest.mark.parametrize(
        ("split", "of", "rows"),
        [("train", "train", 20_000), ("test", "validation", 1_100)],
    )
    def test_c4_is_streamed_and_capped(self, hub, split, of, rows):
        pages = {
            "train.00000-of-01024": [{"text": f"train {i}", "url": "x"} for i in range(20_010)],
            "train.00001-of-01024": [{"text": "of another shard", "url": "x"}],
            "validation.00000-of-00008": [{"text": f"validation {i}"} for i in range(1_110)],
        }
        for name, found in pages.items():
            hub.put(f"allenai/c4/en/c4-{name}.json.gz", found)
        hub.put_card("allenai/c4", {"en": "en/c4-{split}.*", "de": "de/c4-{split}.*"})
        assert texts("c4", split=split) == [f"{of} {i}" for i in range(rows)]
        assert hub.calls[0]["streaming"]

    def test_lamini(self, hub):
        row = {"instruction": "Add the numbers.", "response": "5", "instruction_source": "x"}
        hub.put("MBZUAI/LaMini-instruction/data/train-00000-of-00001-ab.parquet", [row])
        assert load_corpus("lamini").examples == [CHAT_WITHOUT_INPUT]

    def test_alpaca(self, hub):
        hub.put("yahma/alpaca-cleaned/train.parquet", [{**PAIR, "text": "all of it"}])
        assert load_corpus("alpaca").examples == [CHAT]

    @pytest.mark.parametrize(
        ("source", "split", "expected"),
        [
            ("owner/name", "train", ["train 0", "train 1"]),
            ("owner/name", "test", ["test 0", "test 1"]),
            ("owner/name:validation", "test", ["validation 0", "validation 1"]),
            ("owner/name:train[:1]", "train", ["train 0"]),
        ],
    )
    def test_split(self, hub, source, split, expected):
        for name in ("train", "validation", "test"):
            hub.put(f"owner/name/{name}.parquet", [{"text": f"{name} {i}"} for i in range(2)])
        corpus = load_corpus(source, split=split)
        assert corpus.source == source
        assert [example.text for example in corpus.examples] == expected

    def test_split_of_a_short_name(self, hub):
        hub.put("yahma/alpaca-cleaned/train.parquet", [PAIR])
        assert load_corpus("alpaca:train", split="test").examples == [CHAT]

    def test_no_code_of_the_hub_is_trusted(self, hub):
        hub.error = ValueError("enough")
        for name in HUB_SOURCES:
            with pytest.raises(DataError):
                load_corpus(name)
        assert [call["path"] for call in hub.calls] == [
            "Salesforce/wikitext",
            "ptb-text-only/ptb_text_only",
            "allenai/c4",
            "MBZUAI/LaMini-instruction",
            "yahma/alpaca-cleaned",
        ]
        assert not any("trust_remote_code" in call for call in hub.calls)

    def test_local_folder_wins(self, hub):
        write(Path("c4") / "a.txt", "local")
        assert texts("c4") == ["local"]
        assert hub.calls == []

    @pytest.mark.usefixtures("hub")
    def test_nothing_to_evaluate_on(self):
        with pytest.raises(DataError, match=r"'alpaca' has no split to evaluate on\. Use 'alpaca:"):
            load_corpus("alpaca", split="test")

    def test_row_without_fields(self, hub):
        hub.put("owner/name/train.parquet", [{"article": "a"}])
        with pytest.raises(DataError, match=r"'owner/name', row 1, has the fields article\. Ren"):
            load_corpus("owner/name")

    def test_out_of_reach(self, hub):
        hub.error = ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub (X)\nmore.")
        with pytest.raises(
            DataError,
            match=r"out of reach for 'wikitext2' \(Couldn't reach 'Salesforce/wikitext' on the Hub "
            r"\(X\)\)\. Check the network, or give a local file or folder\.",
        ):
            load_corpus("wikitext2")

    @pytest.mark.parametrize(
        "error",
        [
            datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub."),
            datasets.exceptions.DatasetGenerationError("Dataset doesn't exist on the Hub."),
            ValueError("Dataset doesn't exist on the Hub"),
            RuntimeError("Dataset doesn't exist on the Hub"),
            HTTPError("Dataset doesn't exist on the Hub"),
        ],
    )
    def test_not_given(self, hub, error):
        hub.error = error
        with pytest.raises(
            DataError,
            match=r"'owner/name' is no file or folder here, and the hub does not give it "
            r"\(Dataset doesn't exist on the Hub\)\. Check the name, the split and 'hf auth login'",
        ):
            load_corpus("owner/name")

    def test_unknown_split(self, hub):
        hub.put("owner/name/train.parquet", [{"text": "a"}])
        with pytest.raises(DataError, match=r"\(Unknown split \"dev\"\. .*Check the name, the spl"):
            load_corpus("owner/name:dev")


class TestSourceHash:
    def test_content_and_suffix_decide(self, tmp_path):
        one = write(tmp_path / "a.txt", "one")
        first = compute_source_hash(one)
        assert first == compute_source_hash(write(tmp_path / "b.txt", "one"))
        others = [
            compute_source_hash(write(tmp_path / "b.txt", "two")),
            compute_source_hash(write(tmp_path / "a.raw", "one")),
        ]
        os.utime(one, (1, 1))
        assert first == compute_source_hash(one)
        write(tmp_path / "folder" / "a.txt", "one")
        assert compute_source_hash(str(tmp_path / "folder")) == first
        write(tmp_path / "folder" / "notes.md", "not data")
        assert compute_source_hash(str(tmp_path / "folder")) == first
        write(tmp_path / "folder" / "b.txt", "one")
        others.append(compute_source_hash(str(tmp_path / "folder")))
        assert len({first, *others}) == 4

    def test_nothing_is_parsed(self, tmp_path):
        path = write(tmp_path / "a.jsonl", "{")
        assert len(compute_source_hash(path)) == 64
        with pytest.raises(DataError, match="is not valid JSON"):
            load_corpus(path)

    @pytest.mark.parametrize("name", ["nothing.txt", "a.csv", "empty"])
    def test_it_refuses_what_load_corpus_refuses(self, tmp_path, name):
        write(tmp_path / "a.csv", "text")
        (tmp_path / "empty").mkdir()
        sentences = []
        for function in (load_corpus, compute_source_hash):
            with pytest.raises(DataError) as error:
                function(str(tmp_path / name))
            sentences.append(str(error.value))
        assert sentences[0] == sentences[1]

    def test_a_folder_is_no_file(self, tmp_path):
        (tmp_path / "data" / "a.txt").mkdir(parents=True)
        for function in (load_corpus, compute_source_hash):
            with pytest.raises(DataError, match=r"a\.txt' is no regular file"):
                function(str(tmp_path / "data"))

    def test_of_the_hub_split_and_data_decide(self, hub):
        hub.put("owner/name/train.parquet", [{"text": "a"}])
        hub.put("owner/name/test.parquet", [{"text": "b"}])
        first = compute_source_hash("owner/name")
        assert first == compute_source_hash("owner/name")
        assert first == compute_source_hash("owner/name:train", split="test")
        assert first != compute_source_hash("owner/name:test")
        hub.put("owner/name/train.parquet", [{"text": "c"}, {"text": "d"}])
        assert first != compute_source_hash("owner/name")

    def test_what_is_streamed_is_not_known(self, hub):
        hub.put("allenai/c4/en/c4-train.00000-of-01024.json.gz", [{"text": "a"}])
        hub.put("allenai/c4/en/c4-validation.00000-of-00008.json.gz", [{"text": "b"}])
        assert compute_source_hash("c4") is None

    def test_a_hub_out_of_reach(self, hub):
        hub.error = ConnectionError("no")
        with pytest.raises(DataError, match="out of reach for 'owner/name'"):
            compute_source_hash("owner/name")


@real
@pytest.mark.real
class TestRealData:
    def test_tinystories(self):
        found = texts(str(DATA / "tinystories" / "valid.txt"))
        whole = (DATA / "tinystories" / "valid.txt").read_text(encoding="utf-8")
        assert found == [piece.strip("\n") for piece in whole.split("<|endoftext|>")]

    def test_wikitext2_is_one_document(self):
        path = DATA / "wikitext2" / "wiki.test.raw"
        assert texts(str(path)) == [path.read_text(encoding="utf-8").removesuffix("\n")]

    def test_c4(self):
        lines = (DATA / "c4" / "c4_sample_a.jsonl").read_text(encoding="utf-8").split("\n")
        lines += (DATA / "c4" / "c4_sample_b.jsonl").read_text(encoding="utf-8").split("\n")
        assert texts(str(DATA / "c4")) == [json.loads(line)["text"] for line in lines if line]

    def test_alpaca(self):
        corpus = load_corpus(str(DATA / "instruct" / "alpaca_en_demo.json"))
        assert len(corpus.examples) == 999
        assert corpus.is_chat


class TestWhatIsNoData:
    @pytest.mark.parametrize("read", [load_corpus, compute_source_hash])
    def test_an_empty_name_is_not_the_working_folder(self, read, tmp_path, monkeypatch):
        (tmp_path / "secret.txt").write_text("mine")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match="The name of the data is empty"):
            read("")

    @pytest.mark.parametrize("read", [load_corpus, compute_source_hash])
    def test_a_pipe_is_not_waited_for(self, read, tmp_path):
        os.mkfifo(tmp_path / "a.txt")
        for source in (tmp_path / "a.txt", tmp_path):
            with pytest.raises(DataError, match="a.txt' is no regular file. Write the data to a"):
                read(str(source))
        with pytest.raises(DataError, match="'/dev/null' is no regular file"):
            read("/dev/null")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ('{"text": "\\ud83d"}', "line 1: 'text' is not text .*surrogates not allowed"),
            ("[" * 100_000, "line 1, is not valid JSON .maximum recursion depth"),
            ('{"text": ' + "9" * 5000 + "}", "line 1, is not valid JSON .*4300 digits"),
        ],
    )
    def test_json_that_is_no_text(self, text, sentence, tmp_path):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(DataError, match=sentence):
            load_corpus(str(tmp_path / "a.jsonl"))

    def test_parquet_with_bytes_that_are_no_text(self, tmp_path):
        import pyarrow as pa
        from pyarrow import parquet

        data = pa.array([b"\xff\xfe"], pa.binary())
        bad = pa.StringArray.from_buffers(1, *data.buffers()[1:])
        parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="a.parquet' is no readable parquet file .*decode byte"):
            load_corpus(str(tmp_path / "a.parquet"))
