"""`lpdeploy generate`, `chat` and `serve` as users meet them."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from lpdeploy.cli import chat as chat_command
from lpdeploy.cli.main import main
from lpdeploy.generation.examples import PAPER
from tests.cli.test_cli import SMALL, check_refused, invoke, last_json
from tests.generation.test_writer import TEMPLATE, continue_with_transformers
from tests.helpers import make_text, make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_tiny_model(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=256)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = make_text(root / "text.txt")
    assert invoke("prune", folder, "--data", data, "--output", root / "run", *SMALL).exit_code == 0
    assert invoke("compact", root / "run").exit_code == 0
    return root / "run"


def pipe(text, *words):
    return CliRunner().invoke(main, [str(word) for word in words], input=text)


class TestGenerate:
    def test_answers_are_kept_for_the_page(self, run, tmp_path):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("w1 w2\nw3 w4\n")
        words = ("--prompts", prompts, "--max-new-tokens", 4, "--with-base", "--save", "--json")
        answered = last_json(invoke("generate", run, *words))
        kept = json.loads((run / "samples.json").read_text())
        assert [(each["model"], each["opening"]) for each in kept] == [
            ("dense, torch fp32", "w1 w2"), ("dense, torch fp32", "w3 w4"),
            ("pruned, torch fp32", "w1 w2"), ("pruned, torch fp32", "w3 w4"),
        ]  # fmt: skip
        texts = [
            answer["text"] for part in (answered["base"], answered) for answer in part["answers"]
        ]
        assert [each["text"] for each in kept] == texts
        assert invoke("report", run, "--output", tmp_path / "page.html").exit_code == 0
        page = (tmp_path / "page.html").read_text()
        for column in ("prompt", "dense, torch fp32", "pruned, torch fp32"):
            assert f'<th scope="col">{column}</th>' in page
        (run / "samples.json").write_text("[]")
        result = invoke("generate", run, "w1", "--max-new-tokens", 1, "--save")
        check_refused(result, "samples.json' has changed .* delete it and run 'lpdeploy generate")
        (run / "samples.json").unlink()

    def test_answers_of_a_model_that_is_no_run_cannot_be_kept(self, folder):
        result = invoke("generate", folder, "w1", "--save")
        check_refused(result, "--save needs a run, and '.*' is none. Leave it out")

    def test_the_text_alone_is_on_stdout(self, folder):
        words = ("--prompt-format", "raw", "--max-new-tokens", 5)
        result = invoke("generate", folder, "w1 w2", *words)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("w1 w2")["input_ids"]
        expected = continue_with_transformers(folder, ids, 5)
        assert result.stdout.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
        assert "on torch: 5 tokens" in result.stderr
        assert "1 of 1 ended by the limit of new tokens." in result.stderr

    @pytest.mark.parametrize("words", [["-"], []])
    def test_a_prompt_from_a_pipe(self, folder, words):
        typed = invoke("generate", folder, "w1 w2", "--max-new-tokens", 5)
        piped = pipe("w1 w2\n", "generate", folder, *words, "--max-new-tokens", 5)
        assert piped.stdout == typed.stdout

    def test_several_prompts_stand_above_their_answers(self, folder, tmp_path):
        (tmp_path / "prompts.txt").write_text("w1 w2\nw3\n")
        words = ("--max-new-tokens", 3)
        result = invoke("generate", folder, "--prompts", tmp_path / "prompts.txt", *words)
        alone = [invoke("generate", folder, prompt, *words).stdout for prompt in ("w1 w2", "w3")]
        assert result.stdout == f"w1 w2\n{alone[0]}\nw3\n{alone[1]}"

    def test_json(self, run):
        found = last_json(
            invoke("generate", run, "w1 w2", "--max-new-tokens", 4, "--with-base", "--json")
        )
        assert found["engine"] == found["base"]["engine"] == "torch"
        assert found["model"] == str(run)
        for each in (found, found["base"]):
            (answer,) = each["answers"]
            assert answer["prompt"] == "w1 w2"
            assert answer["reason"] in ("stop", "length")
            assert answer["tokens"] <= 4

    def test_both_models_side_by_side(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        result = invoke("generate", run, "--examples", "--max-new-tokens", 4, "--with-base")
        assert result.exit_code == 0, result.output
        (header,) = [line for line in result.stdout.splitlines() if "unpruned" in line]
        assert header.split() == ["prompt", "pruned", "unpruned"]
        assert all(prompt.split()[0] in result.stdout for prompt in PAPER)
        assert result.stderr.count("tokens") >= 2

    @pytest.mark.parametrize(
        ("words", "sentence", "code"),
        [
            (["w1", "--examples"], r"Give one of PROMPT, --prompts and --examples\.", 2),
            (["w1", "--temperature", "-1"], r"--temperature is -1\.0; it must be 0", 2),
            (["w1", "--top-p", "0"], r"--top-p is 0\.0; it must be above 0", 2),
            (
                ["w1", "--system", "x", "--prompt-format", "raw"],
                "--system is a turn of a conversation; it contradicts --prompt-format raw",
                2,
            ),
            (
                ["w1", "--max-new-tokens", "300"],
                "Shorten the prompt, or use a smaller --max-new",
                1,
            ),
            (["w1", "--with-base"], "--with-base needs a run", 1),
            (["w1", "--engine", "ort"], "has no export for ort. Run 'lpdeploy export", 1),
        ],
    )
    def test_bad_input(self, folder, words, sentence, code):
        check_refused(invoke("generate", folder, *words), sentence, code=code)


class TestChat:
    def test_lines_of_a_pipe(self, folder):
        words = ("--max-new-tokens", 4, "--json")
        result = pipe("w1 w2\n\nw3\n/clear\nw1 w2\n/exit\nw5\n", "chat", folder, *words)
        turns = last_json(result)["messages"]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert asked == ["w1 w2", "w3", "w1 w2"]
        assert answers[0] == answers[2]  # nothing of the first conversation is remembered
        plain = pipe("w1 w2\nw3\n", "chat", folder, "--max-new-tokens", 4)
        assert plain.stdout.splitlines() == answers[:2]
        assert "The answer was cut after 4 tokens." in plain.stderr

    def test_what_cannot_be_answered_ends_nothing(self, folder):
        lines = "w1\n" + "w2 " * 300 + "\nw3\n"
        result = pipe(lines, "chat", folder, "--max-new-tokens", 4, "--json")
        assert result.exit_code == 1
        turns = json.loads(result.stdout)["messages"]
        assert [turn["content"] for turn in turns if turn["role"] == "user"] == ["w1", "w3"]
        assert "Error: A prompt of" in result.stderr

    def test_what_was_said_is_not_lost_when_it_is_interrupted(self, folder, monkeypatch):
        def interrupt():
            yield "w1"
            raise KeyboardInterrupt

        monkeypatch.setattr(chat_command, "_read_lines", interrupt)
        result = invoke("chat", folder, "--max-new-tokens", 4, "--json")
        assert result.exit_code == 130
        assert [turn["role"] for turn in json.loads(result.stdout)["messages"]] == [
            "user", "assistant",
        ]  # fmt: skip

    def test_a_model_without_a_template_is_refused_before_anything_is_typed(self, tmp_path):
        model = make_tiny_model(tmp_path / "m")
        check_refused(pipe("w1\n", "chat", model), "The tokenizer has no chat template.")
        result = pipe("w1\n", "chat", model, "--prompt-format", "instruction", "--seed", 0)
        assert result.exit_code == 0, result.output


class TestServe:
    def test_a_port_in_use(self, folder):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            result = invoke("serve", folder, "--port", port)
        check_refused(result, rf"Cannot listen on port {port} of 127\.0\.0\.1 \(Address already")

    @pytest.mark.slow
    def test_it_answers_and_ends_when_interrupted(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "lpdeploy", "serve", str(folder), "--port", str(port)]
        server = subprocess.Popen(
            [*command, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            ready = json.loads(server.stdout.readline())
            assert ready["url"] == f"http://127.0.0.1:{port}/v1"
            assert ready["model"] == str(folder)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            turns = [{"role": "user", "content": "w1"}]
            body = {"model": ready["model"], "messages": turns, "max_tokens": 3}
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            answer = json.loads(connection.getresponse().read())
            assert answer["choices"][0]["message"]["role"] == "assistant"
            server.send_signal(signal.SIGTERM)  # a job in the background ignores SIGINT
            assert server.wait(60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):  # transformers' own process, too
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
