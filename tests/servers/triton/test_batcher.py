"""Requests that join and leave a running batch, against transformers' answers to each alone."""

import queue
import random
import threading

import pytest
import torch

from lpdeploy.engines import get_engine
from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.engines.sampler import Sampler
from lpdeploy.engines.sampling import Sampling
from lpdeploy.engines.torch.runner import TorchRunner
from lpdeploy.models.loading import load_model
from lpdeploy.servers.triton.batcher import Batcher, BusyError, Request
from lpdeploy.servers.triton.rows import JoiningRows, Size, StandingRows
from tests.helpers import make_tiny_model

POSITIONS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    model = make_tiny_model(
        root / "model", head_dim=16, kv_heads=2, max_position_embeddings=POSITIONS
    )
    export_ort(model, root / "ort")
    return root


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "model").eval()


@pytest.fixture(params=["ort", pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def runner(folder, model, request):
    if request.param == "torch":
        return TorchRunner(model)
    exported = folder / request.param
    if request.param == "onnx" and not exported.exists():  # takes seconds
        export_onnx(folder / "model", exported)
    return get_engine(request.param).load(exported)


@pytest.fixture
def batcher(runner):
    made = Batcher(runner, max_batch=3)
    yield made
    made.close()


def answer(model, prompt, count, stop=()):
    """What transformers adds to one prompt, greedily, alone."""
    ids = torch.tensor([prompt])
    eos = list(stop) or None
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


class Client:
    """Asks, and keeps what it is told."""

    def __init__(self, batcher, prompt, count, *, leaves_after=None, **options):
        self.tokens, self.reason = [], None
        if leaves_after is not None:
            options["is_cancelled"] = lambda: len(self.tokens) >= leaves_after
        self.ended = threading.Event()
        self.error = None
        self.each = queue.Queue()
        request = Request(
            prompt=prompt, max_new_tokens=count, on_token=self._hear, on_error=self._fail, **options
        )
        batcher.submit(request)

    def _hear(self, token, reason):
        if token is not None:
            self.tokens.append(token)
        self.each.put(token)
        if reason:
            self.reason = reason
            self.ended.set()
        return False

    def _fail(self, error):
        self.error = error
        self.ended.set()

    def wait(self):
        assert self.ended.wait(30)
        return self.tokens


def draw_prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 64) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


@pytest.mark.slow
def test_many_requests_of_any_lengths_get_what_each_would_get_alone(batcher, model):
    prompts = draw_prompts(12)
    counts = [random.Random(index).randrange(1, 30) for index in range(12)]
    clients = [Client(batcher, *pair) for pair in zip(prompts, counts, strict=True)]
    for client, prompt, count in zip(clients, prompts, counts, strict=True):
        assert client.wait() == answer(model, prompt, count)
        assert client.reason == "length"


def test_those_who_come_later_change_nothing_for_those_before(batcher, model):
    first, second, third = draw_prompts(3, seed=1)
    early = Client(batcher, first, 40)
    for _ in range(5):
        early.each.get(timeout=30)
    late = [Client(batcher, second, 8), Client(batcher, third, 4)]
    assert [client.wait() for client in late] == [
        answer(model, second, 8),
        answer(model, third, 4),
    ]
    assert early.wait() == answer(model, first, 40)


def test_a_stop_token_ends_its_request_alone(batcher, model):
    prompt, other = draw_prompts(2, seed=2)
    tokens = answer(model, prompt, 20)
    stop = tokens[6]
    client = Client(batcher, prompt, 20, stop_ids={stop})
    company = Client(batcher, other, 20)
    assert client.wait() == tokens[: tokens.index(stop) + 1]
    assert client.reason == "stop"
    assert company.wait() == answer(model, other, 20)


def test_who_leaves_frees_the_row_and_disturbs_nobody(batcher, model):
    prompts = draw_prompts(4, seed=3)
    leaver = Client(batcher, prompts[0], 50 - len(prompts[0]), leaves_after=3)
    company = [Client(batcher, prompt, 25) for prompt in prompts[1:]]
    heard = leaver.wait()
    assert leaver.reason == "cancelled"
    assert heard == answer(model, prompts[0], 50 - len(prompts[0]))[: len(heard)]
    for client, prompt in zip(company, prompts[1:], strict=True):
        assert client.wait() == answer(model, prompt, 25)


def test_who_leaves_while_waiting_is_never_run(batcher):
    clients = [Client(batcher, [5], 50) for _ in range(3)]
    left = Client(batcher, [7], 50, is_cancelled=lambda: True)
    assert left.wait() == []
    assert left.reason == "cancelled"
    assert all(len(client.wait()) == 50 for client in clients)


def test_a_seed_gives_the_same_answer_alone_and_in_company(batcher):
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    alone = Client(batcher, [5, 9, 33], 20, sampling=sampling).wait()
    company = [Client(batcher, [index + 3], 20, sampling=Sampling(1.0)) for index in range(2)]
    again = Client(batcher, [5, 9, 33], 20, sampling=sampling)
    assert again.wait() == alone
    assert all(len(client.wait()) == 20 for client in company)
    greedy = Client(batcher, [5, 9, 33], 20).wait()
    assert alone != greedy


def test_a_listener_that_fails_ends_its_own_request(batcher, model):
    failed = threading.Event()

    def fail(token, reason):
        raise OSError("gone")

    request = Request([5, 6], 20, on_token=fail, on_error=lambda _: failed.set())
    batcher.submit(request)
    assert Client(batcher, [8, 9], 10).wait() == answer(model, [8, 9], 10)
    assert failed.wait(30)


class Faults:
    """What a request may bring that fails by itself."""

    def fail(self, *_):
        raise OSError("gone")

    @property
    def requests(self):
        quiet = {"on_token": lambda *_: False, "on_error": lambda _: None}
        return {
            "a listener": {**quiet, "on_token": self.fail},
            "a listener that cannot hear of it": {"on_token": self.fail, "on_error": self.fail},
            "who asks whether it is left": {**quiet, "is_cancelled": self.fail},
            "that, and cannot hear of it": {
                "on_token": self.fail, "on_error": self.fail, "is_cancelled": self.fail,
            },
        }  # fmt: skip


@pytest.mark.parametrize("name", Faults().requests)
def test_a_request_that_fails_ends_alone(batcher, model, name):
    company = [Client(batcher, prompt, 25) for prompt in ([8, 9], [7])]
    for _ in range(3):
        batcher.submit(Request([5, 6], 20, **Faults().requests[name]))
    assert company[0].wait() == answer(model, [8, 9], 25)
    assert company[1].wait() == answer(model, [7], 25)
    assert Client(batcher, [4, 4], 10).wait() == answer(model, [4, 4], 10)


def test_numbers_that_cannot_be_sampled_end_one_request(batcher, model, monkeypatch):
    choose = Sampler.choose

    def fail(self, logits, best):
        if not self._greedy:
            raise RuntimeError("probability tensor contains nan")
        return choose(self, logits, best)

    monkeypatch.setattr(Sampler, "choose", fail)
    company = Client(batcher, [8, 9], 25)
    failed = Client(batcher, [5], 20, sampling=Sampling(1.0))
    assert company.wait() == answer(model, [8, 9], 25)
    assert failed.ended.wait(30)
    assert "nan" in str(failed.error)


def test_prompts_that_the_engine_cannot_run_leave_the_others(folder, model):
    runner = load_ort_runner(folder / "ort")
    forward = runner.forward

    def fail(tokens, **options):
        if tokens.shape[1] == 7:
            raise RuntimeError("out of memory")
        return forward(tokens, **options)

    runner.forward = fail
    batcher = Batcher(runner, max_batch=3)
    company = Client(batcher, [8, 9], 25)
    company.each.get(timeout=30)
    failed = Client(batcher, [5] * 7, 20)
    assert failed.ended.wait(30)
    assert str(failed.error) == "out of memory"
    assert company.wait() == answer(model, [8, 9], 25)
    assert Client(batcher, [4, 4], 10).wait() == answer(model, [4, 4], 10)
    batcher.close()


@pytest.mark.parametrize("token", [-1, 10**4, 10**9])
def test_a_token_that_is_none_is_refused(batcher, token):
    with pytest.raises(ValueError, match="a token that the model does not embed"):
        Client(batcher, [5, token], 4)


SAMPLINGS = [
    {"top_k": 1.5}, {"top_k": -1}, {"top_k": True}, {"temperature": 1e-300},
    {"temperature": 1e300}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": -1}, {"top_p": 0}, {"top_p": float("nan")}, {"top_p": 2}, {"seed": 1.5},
    {"seed": -1}, {"seed": 2**63},
]  # fmt: skip


@pytest.mark.parametrize("values", SAMPLINGS, ids=str)
def test_what_a_sampler_cannot_take_is_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .*; it must be"):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_the_ends_of_the_temperatures_can_be_sampled(temperature):
    logits = torch.tensor([3e4, -3e4, 0.0, 3e4])
    assert 0 <= Sampler(Sampling(temperature, top_k=2, top_p=0.5)).choose(logits, 0) < 4


def test_an_engine_that_fails_ends_what_runs_and_goes_on(folder, model):
    runner = load_ort_runner(folder / "ort")
    forward, calls = runner.forward, []

    def fail_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*arguments, **options)

    runner.forward = fail_once
    batcher = Batcher(runner, max_batch=2)
    client = Client(batcher, [5, 6], 20)
    assert client.wait() == answer(model, [5, 6], 2)
    assert str(client.error) == "out of memory"
    assert Client(batcher, [8, 9], 10).wait() == answer(model, [8, 9], 10)
    batcher.close()


@pytest.mark.parametrize(
    ("prompt", "count", "sentence"),
    [
        ([], 4, "the prompt has no tokens"),
        ([5], 0, "max_tokens is 0"),
        ([5] * 50, 11, "need 61 positions, and the model is served with 60"),
    ],
)
def test_what_cannot_be_answered(batcher, prompt, count, sentence):
    with pytest.raises(ValueError, match=sentence):
        Client(batcher, prompt, count)


def test_the_longest_that_fits(batcher, model):
    prompt = draw_prompts(1, seed=5)[0]
    count = POSITIONS - len(prompt)
    assert Client(batcher, prompt, count).wait() == answer(model, prompt, count)


def test_too_many_wait(folder):
    runner = load_ort_runner(folder / "ort")
    free = threading.Event()
    forward = runner.forward
    runner.forward = lambda *a, **o: free.wait(30) and forward(*a, **o)
    batcher = Batcher(runner, max_batch=1, max_waiting=2)
    running = Client(batcher, [5], 2)
    while batcher._waiting:  # until it has its row
        pass
    waiting = [Client(batcher, [6], 2) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests wait already"):
        Client(batcher, [7], 2)
    free.set()
    assert all(len(client.wait()) == 2 for client in [running, *waiting])
    batcher.close()
    with pytest.raises(BusyError, match="shutting down"):
        Client(batcher, [7], 2)


def test_closing_answers_what_was_asked(folder, model):
    batcher = Batcher(load_ort_runner(folder / "ort"), max_batch=1)
    clients = [Client(batcher, [index + 5], 10) for index in range(3)]
    batcher.close()
    assert [client.tokens for client in clients] == [
        answer(model, [index + 5], 10) for index in range(3)
    ]


def test_how_many_join_at_once(folder, model):
    rows = JoiningRows(load_ort_runner(folder / "ort"), 3)
    assert rows.count_startable([Size(1500, 1), Size(1, 1)]) == 1  # 3,000 tokens with padding
    assert rows.count_startable([Size(9000, 1)]) == 1  # alone, however long
    assert rows.count_startable([Size(5, 1)] * 9) == 3
    rows.start([[5], [6]])
    assert rows.count_startable([Size(5, 1)] * 9) == 1
    standing = StandingRows(TorchRunner(model), 3)
    assert standing.count_startable([Size(5, 50), Size(30, 2)]) == 1  # 30 + 50 positions
    assert standing.count_startable([Size(5, 30), Size(30, 2)]) == 2
    standing.start([[5]])
    assert standing.count_startable([Size(5, 1)]) == 0
