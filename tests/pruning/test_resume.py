"""Going on with a run: to the bit, after a signal, after a full disk; and what is refused."""

import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpdeploy.cli.signals import stop_on_signal
from lpdeploy.conflicts import BUDGETS, LATENCY
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import ArtifactError, RunEndedError
from lpdeploy.fields import RENAMED
from lpdeploy.run_folder import RunFolder
from tests.helpers import list_names, make_text, make_tiny_model, set_launcher
from tests.pruning.test_run import StoppedError, load_log, run, stop_after

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESULTS = ("adapter/adapter_model.safetensors", "importance.safetensors", "plan.json")
# What a step is measured by differs from run to run; what it computes does not.
COMPUTED = ("step", "steps", "loss", "ratio", "lr", "removed", "padding")


def assert_same_run(folder, expected):
    for name in RESULTS:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    logs = [
        [{name: line[name] for name in COMPUTED} for line in load_log(path)]
        for path in (folder, expected)
    ]
    assert logs[0] == logs[1]


def make_pairs(path):
    rows = [
        {"instruction": f"w{n % 7} " * (1 + n % 3), "output": f"w{n % 5} w{n % 11} " * (1 + n % 4)}
        for n in range(30)
    ]
    path.write_text(json.dumps(rows))
    return path


CASES = {
    **{name: {"criterion": name} for name in CRITERIA},
    **{f"{name}-mask": {"criterion": name, "removal": "mask"} for name in ("lora", "gradient")},
    "global": {"scope": "global"},
    "global-mask-absolute": {"scope": "global", "removal": "mask", "score_form": "absolute"},
    "8bit": {"load_in": "8bit"},
    "8bit-mask": {"load_in": "8bit", "removal": "mask", "criterion": "wanda"},
    "4bit": {"load_in": "4bit", "removal": "mask"},
    "early": {"ramp": "early", "calibration_samples": 6},
    "paper-normalize": {"ramp": "paper", "normalize": True},
    "separate-global": {"schedule": "separate", "calibration_samples": 6, "scope": "global"},
    "checkpointing": {"gradient_checkpointing": True},
    "protected": {"protect_last": 1},
    "ratios": {"head_ratio": 0.0, "channel_ratio": 0.6},
    "query-heads": {"heads": "query-heads", "head_ratio": 0.5},
    "pairs": {"seq_len": 64},
}


# In turn: an event after the checkpoint has to be repeated, or is the next thing to come.
@pytest.mark.slow
@pytest.mark.parametrize(("case", "step"), zip(CASES, itertools.cycle([4, 7]), strict=False))
def test_a_resumed_run_is_the_same_to_the_bit(base, data, tmp_path, case, step):
    """Dropout is on, the rate changes at each step, and groups go at every second one."""
    text = make_pairs(tmp_path / "pairs.json") if case == "pairs" else data
    options = CASES[case]
    if case == "4bit":  # which a CPU computes right only in whole blocks of 64
        base = make_tiny_model(
            tmp_path / "wide", heads=8, kv_heads=4, hidden_size=64, intermediate_size=64
        )
    whole = run(base, tmp_path / "whole", text, options=options)
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", text, options=options, on_step=stop_after(step))
    resumed = run(base, tmp_path / "run", text, options=options, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert resumed.loss == whole.loss
    assert resumed.achieved == whole.achieved


@pytest.mark.slow
def test_a_run_may_be_resumed_again_and_again(base, data, tmp_path):
    whole = run(base, tmp_path / "whole", data, options={"checkpoint_every": 1})
    for step in range(2, 9):  # each time one step further: the checkpoint is of the one before
        with pytest.raises(StoppedError):
            run(base, tmp_path / "run", data, options={"checkpoint_every": 1}, resume=step > 2,
                on_step=stop_after(step))  # fmt: skip
    resumed = run(base, tmp_path / "run", data, options={"checkpoint_every": 1}, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert resumed.loss == whole.loss


def test_a_checkpoint_is_one_file_of_adapters_moments_and_scores(base, data, tmp_path):
    def check(info):
        names = [path.name for path in (tmp_path / "run" / "checkpoint").glob("*")]
        assert names == ([] if info.step <= 3 else ["state.safetensors"])

    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, on_step=lambda i: (check(i), stop_after(7)(i)))
    path = tmp_path / "run" / "checkpoint" / "state.safetensors"
    tensors = load_file(path)
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"lora", "moments", "kept", "average", "last_seen"}
    lora = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("lora."))
    groups = 2 * (2 + 48)  # layers, heads and channels
    steps = sum(name.endswith(".step") for name in tensors)
    # The factors and two moments of each; a count for each; int64 and two float32 a group.
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 3 * lora + 4 * steps + 16 * groups
    assert not set(load_file(base / "model.safetensors")) & {
        name.removeprefix("lora.") for name in tensors
    }


class TestStopping:
    @pytest.mark.parametrize(("options", "step"), [({}, 4), ({"calibration_samples": 6}, 0)])
    def test_a_run_ends_after_the_step_with_a_checkpoint(self, base, data, tmp_path, options, step):
        options = options | {"checkpoint_every": 0}
        stop = threading.Event()

        def on_step(info):
            if info.step == step:
                stop.set()

        run(base, tmp_path / "whole", data, options=options)
        with pytest.raises(
            RunEndedError,
            match=rf"told to end\. The state after step {step} is kept in '.*state\.safetensors'\. "
            r"Go on with `resume=True`\.",
        ):
            run(base, tmp_path / "run", data, options=options, on_step=on_step, stop=stop)
        assert load_log(tmp_path / "run")[-1]["step"] == step
        run(base, tmp_path / "run", data, options=options, resume=True)
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_in_the_last_step_the_run_is_completed(self, base, data, tmp_path):
        stop = threading.Event()

        def on_step(info):
            if info.step == info.steps:
                stop.set()

        run(base, tmp_path / "run", data, on_step=on_step, stop=stop)
        run(base, tmp_path / "whole", data)
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_the_library_handles_no_signal(self, base, data, tmp_path):
        before = [signal.getsignal(n) for n in SIGNALS]
        seen = []
        run(base, tmp_path / "run", data,
            on_step=lambda _: seen.append([signal.getsignal(n) for n in SIGNALS]))  # fmt: skip
        assert seen == [before] * 8

    def test_a_run_that_was_broken_off_goes_on_from_its_last_checkpoint(self, base, data, tmp_path):
        def on_step(info):
            if info.step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "run", data, on_step=on_step)
        with safe_open(tmp_path / "run" / "checkpoint" / "state.safetensors", "pt") as file:
            assert file.metadata()["step"] == "3"  # the last that was due
        run(base, tmp_path / "run", data, resume=True)
        run(base, tmp_path / "whole", data)
        assert_same_run(tmp_path / "run", tmp_path / "whole")


class TestSignals:
    """The command line turns the first signal into a stop after the step."""

    @pytest.fixture(autouse=True)
    def handlers(self):
        before = [(n, signal.signal(n, signal.default_int_handler)) for n in SIGNALS]
        yield
        for number, handler in before:
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", SIGNALS)
    def test_the_first_signal_stops_and_the_second_ends_at_once(self, number, capsys):
        stop = threading.Event()
        with pytest.raises(KeyboardInterrupt), stop_on_signal(stop):
            os.kill(os.getpid(), number)
            assert stop.wait(10)
            assert "Ending after this step, with a checkpoint." in capsys.readouterr().err
            os.kill(os.getpid(), number)
            time.sleep(60)  # which it breaks
        assert [signal.getsignal(n) for n in SIGNALS] == [signal.default_int_handler] * 2

    def test_an_ignored_signal_stays_ignored(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = threading.Event()
        with stop_on_signal(stop):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert not stop.is_set()

    def test_a_rank_ignores_later_signals_until_it_has_ended(self, monkeypatch):
        set_launcher(monkeypatch)
        stop = threading.Event()
        with pytest.raises(RunEndedError), stop_on_signal(stop):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.wait(10)
            raise RunEndedError
        os.kill(os.getpid(), signal.SIGTERM)  # while it writes what went wrong

    @pytest.mark.slow
    def test_on_the_command_line(self, base, data, tmp_path):
        command = [
            sys.executable, "-m", "lpdeploy", "prune", str(base), "--data", str(data),
            "--output", str(tmp_path / "run"), "--steps", "4000", "--batch-size", "4",
            "--micro-batch-size", "4", "--seq-len", "24", "--round-to", "4", "--device", "cpu",
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        log = tmp_path / "run" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate()
        assert process.returncode == 130
        last = load_log(tmp_path / "run")[-1]["step"]
        assert shown.splitlines()[-1] == (
            f"Error: The run was told to end. The state after step {last} is kept in "
            f"'{tmp_path / 'run' / 'checkpoint' / 'state.safetensors'}'. Go on with --resume."
        )
        assert "Traceback" not in shown
        with safe_open(tmp_path / "run" / "checkpoint" / "state.safetensors", "pt") as file:
            assert file.metadata()["step"] == str(last)
        assert list_names(tmp_path / "run") == [
            "checkpoint", "log.jsonl", "recipe.yaml",
        ]  # fmt: skip


@contextlib.contextmanager
def limited_files():
    """Yield a function that limits how large a file may become, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestFullDisk:
    @pytest.mark.slow
    @pytest.mark.parametrize(("step", "kept"), [(5, 3), (8, 6)])  # before a checkpoint; the results
    def test_a_real_one_leaves_the_last_checkpoint_whole(
        self, base, data, tmp_path, small_disk, step, kept
    ):
        filler = small_disk / "filler"

        def on_step(info):
            if info.step == step:  # its own line is written already
                with contextlib.suppress(OSError), filler.open("wb") as stream:
                    stream.write(bytes(1 << 20))
                # A block for one more line of the log: what does not fit is the checkpoint.
                os.truncate(filler, filler.stat().st_size - 4096)

        with pytest.raises(
            ArtifactError,
            match=rf"There is no space left to write '.*/disk/run'\. The "
            rf"checkpoint of step {kept} is whole: make room, then go on with `resume=True`\.",
        ):
            run(base, small_disk / "run", data, on_step=on_step)
        load_file(small_disk / "run" / "checkpoint" / "state.safetensors")
        assert not (small_disk / "run" / "plan.json").exists()
        assert not list((small_disk / "run").rglob(".*.tmp-*"))
        filler.unlink()
        run(base, small_disk / "run", data, resume=True)
        run(base, tmp_path / "whole", data)
        assert_same_run(small_disk / "run", tmp_path / "whole")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("what", "step", "rest"),
        [
            (
                "line",
                1,
                "There is no checkpoint yet: make room, then start anew with `overwrite=True`",
            ),
            ("line", 4, "The checkpoint of step 3 is whole"),
            ("checkpoint", 2, "There is no checkpoint yet"),
            ("checkpoint", 5, "The checkpoint of step 3 is whole"),
            ("results", 8, "The checkpoint of step 6 is whole"),
        ],
    )
    def test_nothing_is_half_written(self, base, data, tmp_path, what, step, rest):
        folder = tmp_path / "run"
        with limited_files() as limit:

            def on_step(info):
                if info.step == step:
                    size = (folder / "log.jsonl").stat().st_size
                    limit(size + 20 if what == "line" else size + 1000)

            with pytest.raises(ArtifactError, match=rf"left to write '.*'\. {rest}"):
                run(base, folder, data, on_step=on_step)
        text = (folder / "log.jsonl").read_text()
        lines = [json.loads(line)["step"] for line in text.splitlines()]
        assert lines == list(range(1, step + (1 if what != "checkpoint" else 2)))
        assert text.endswith("\n")
        assert not (folder / "plan.json").exists()
        assert not (folder / "adapter").exists()
        assert not list(folder.rglob(".*.tmp-*"))
        again = {"overwrite": True} if "no checkpoint" in rest else {"resume": True}
        run(base, folder, data, **again)
        run(base, tmp_path / "whole", data)
        assert_same_run(folder, tmp_path / "whole")

    def test_another_error_of_the_system_is_left_as_it_is(self, base, data, tmp_path):
        def on_step(_):
            raise PermissionError("not this one")

        with pytest.raises(PermissionError, match="not this one"):
            run(base, tmp_path / "run", data, on_step=on_step)


class TestRefusals:
    def test_nothing_to_resume(self, base, tmp_path):
        RunFolder(tmp_path / "begun").claim(clear=True)
        RunFolder(tmp_path / "begun").recipe.touch()
        for folder, how in (("never", "without `resume=True`"), ("begun", "with `overwrite=True`")):
            sentence = f"Nothing to resume: '.*' holds no checkpoint. Run {how} to start anew."
            with pytest.raises(ArtifactError, match=sentence):  # before any data is read
                run(base, tmp_path / folder, tmp_path / "no data", resume=True)
        assert not (tmp_path / "never").exists()

    def test_a_complete_run(self, base, data, tmp_path):
        run(base, tmp_path / "run", data)
        with pytest.raises(ArtifactError, match="the run in .* is complete. Go on with 'lpdeploy"):
            run(base, tmp_path / "run", data, resume=True)

    @pytest.fixture
    def stopped(self, base, data, tmp_path):
        with pytest.raises(StoppedError):
            run(base, tmp_path / "run", data, on_step=stop_after(5))
        return tmp_path / "run"

    def test_every_difference_is_named(self, base, data, tmp_path, stopped):
        other = make_tiny_model(tmp_path / "other", heads=4, kv_heads=2, seed=5)
        text = make_text(tmp_path / "more.txt", documents=50)
        before = (stopped / "checkpoint" / "state.safetensors").read_bytes()
        with pytest.raises(ArtifactError) as error:
            run(other, stopped, text, resume=True, options={"ratio": 0.25, "seed": 1, "lr": 1.0})
        sentence = str(error.value)
        for part in (
            f"The checkpoint in '{stopped}' is of another run: base was '{base}' (sha256 ",
            f") and is '{other}' (sha256 ",
            f"data was '{data}' (sha256 ",
            f") and is '{text}' (sha256 ",
            "; ratio was 0.5 and is 0.25 now; seed was 0 and is 1 now. Use the same, or `overwr",
        ):
            assert part in sentence
        assert "lr was" not in sentence  # it may be lowered
        assert (stopped / "checkpoint" / "state.safetensors").read_bytes() == before
        assert yaml.safe_load((stopped / "recipe.yaml").read_text())["prune"]["model"] == str(base)

    @pytest.mark.parametrize("recipe", [None, "no yaml: [", "prune: 3", "bench: {}"])
    def test_a_recipe_that_is_gone_leaves_the_old_name_open(self, base, data, stopped, recipe):
        (stopped / "recipe.yaml").unlink()
        if recipe is not None:
            (stopped / "recipe.yaml").write_text(recipe)
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=r"base was another \(sha256 .{12}\) and is '.*now"):
            run(base, stopped, data, resume=True)

    def edit(self, stopped, *, tensors=lambda tensors: tensors, signed=False, **changes):
        path = stopped / "checkpoint" / "state.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        changed = tensors({name: tensor.clone() for name, tensor in load_file(path).items()})
        if not signed:  # as earlier versions wrote it
            metadata.pop("sha256", None)
        for name, change in changes.items():
            value = change(json.loads(metadata[name]))
            metadata[name] = json.dumps(value)
        save_file(changed, path, metadata=metadata)

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"step": lambda _: 10**9}, "is of step 1000000000, and the run has"),
            ({"step": lambda _: -1}, "is of step -1, and the run has"),
            ({"step": lambda _: 2.5}, r"damaged \(step is 2.5, not int"),
            ({"tensors": lambda t: {k: v for k, v in t.items() if "exp_avg_sq" not in k}},
             "nothing for moments.*exp_avg_sq"),
            ({"tensors": lambda t: {k: v for k, v in t.items() if "lora_A" not in k}},
             "nothing for lora.*lora_A"),
            ({"tensors": lambda t: {k: v[:1].clone() if k.startswith("lora.") else v
                                    for k, v in t.items()}},
             "has shape .* and the run needs shape"),
        ],
    )  # fmt: skip
    def test_one_that_does_not_fit_is_refused(self, base, data, stopped, changes, sentence, signed):
        self.edit(stopped, signed=signed, **changes)
        if signed:
            sentence = "damaged \\((its contents are not those that were written|step is)"
        with pytest.raises(ArtifactError, match=sentence):
            run(base, stopped, data, resume=True)

    def test_a_changed_number_is_found(self, base, data, stopped):
        def nudge(tensors):
            next(v for k, v in tensors.items() if k.startswith("lora."))[0] += 1e-3
            return tensors

        self.edit(stopped, signed=True, tensors=nudge)
        with pytest.raises(ArtifactError, match="contents are not those that were written"):
            run(base, stopped, data, resume=True)

    def test_a_checkpoint_of_former_names_goes_on(self, base, data, tmp_path, stopped):
        """As it was written before fields were renamed, and before some of them existed."""
        former = {name: old for old, name in RENAMED.items()}
        later = {*BUDGETS, *LATENCY}

        def age(options):
            return {former.get(k, k): v for k, v in options.items() if k not in later}

        self.edit(stopped, options=age)
        run(base, stopped, data, resume=True)
        run(base, tmp_path / "whole", data)
        assert_same_run(stopped, tmp_path / "whole")

    def test_a_checkpoint_from_before_lora_had_two_starts_is_one_of_pefts(
        self, base, data, tmp_path
    ):
        started = {"lora_init": "peft"}
        with pytest.raises(StoppedError):
            run(base, tmp_path / "old", data, options=started, on_step=stop_after(5))
        self.edit(
            tmp_path / "old", options=lambda o: {k: v for k, v in o.items() if k not in started}
        )
        with pytest.raises(ArtifactError, match="lora_init was 'peft' and is 'groups' now"):
            run(base, tmp_path / "old", data, resume=True)
        run(base, tmp_path / "old", data, options=started, resume=True)
        run(base, tmp_path / "whole", data, options=started)
        assert_same_run(tmp_path / "old", tmp_path / "whole")

    def test_a_renamed_option_that_differs_is_named(self, base, data, stopped):
        self.edit(stopped, options=lambda o: {k: v for k, v in o.items() if k != "prune_warmup"})
        self.edit(stopped, options=lambda o: o | {"warmup": 0.25})
        with pytest.raises(ArtifactError, match="prune_warmup was 0.25 and is None now"):
            run(base, stopped, data, resume=True)

    def test_another_version_of_the_format(self, base, data, stopped):
        self.edit(stopped, schema_version=lambda _: 2, lpdeploy=lambda _: "9.9")
        with pytest.raises(
            ArtifactError,
            match=r"has schema version 2, and this lpdeploy reads 1\. Go on with the version that "
            r"wrote it \(lpdeploy 9\.9\), or use `overwrite=True` to start anew\.",
        ):
            run(base, stopped, data, resume=True)

    def test_a_file_of_something_else(self, base, data, stopped):
        save_file({"weight": torch.ones(2)}, stopped / "checkpoint" / "state.safetensors")
        with pytest.raises(ArtifactError, match=r"has schema version None, and .*wrote it, or use"):
            run(base, stopped, data, resume=True)

    def test_a_damaged_file(self, base, data, stopped):
        path = stopped / "checkpoint" / "state.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(
            ArtifactError, match=r"is damaged \(.*\)\. Run with `overwrite=True` to"
        ):
            run(base, stopped, data, resume=True)

    def test_other_libraries_are_told(self, base, data, tmp_path, stopped, told):
        run(base, tmp_path / "whole", data)
        self.edit(stopped, environment=lambda e: e | {"torch": "1.0", "threads": 99})
        run(base, stopped, data, resume=True)
        (line,) = [line for line in told if line.startswith("Going on where other")]
        assert f"torch was 1.0 and is {torch.__version__}".split("+")[0] in line
        assert f"threads was 99 and is {torch.get_num_threads()}" in line
        assert "not the same to the bit" in line
        assert_same_run(stopped, tmp_path / "whole")

    def test_the_same_libraries_are_not_told(self, base, data, stopped, told):
        run(base, stopped, data, resume=True)
        assert not any("Going on where" in line for line in told)

    def test_a_half_line_of_the_log_is_dropped(self, base, data, tmp_path, stopped):
        with (stopped / "log.jsonl").open("a") as stream:
            stream.write('{"step": 6, "lo')  # what a machine that lost its power may leave
        run(base, stopped, data, resume=True)
        run(base, tmp_path / "whole", data)
        assert_same_run(stopped, tmp_path / "whole")

    def test_a_damaged_line_of_the_log_is_named(self, base, data, stopped):
        path = stopped / "log.jsonl"
        path.write_text("nonsense\n" + path.read_text())
        with pytest.raises(ArtifactError, match=r"log\.jsonl', line 1, cannot be used"):
            run(base, stopped, data, resume=True)

    def test_leftovers_of_killed_processes_go(self, base, data, stopped):
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        names = ("plan.json", "log.jsonl", "importance.safetensors", "checkpoint/state.safetensors")
        for name in names:
            path = stopped / name
            path.with_name(f".{path.name}.tmp-{dead.pid}").write_text("half")
        run(base, stopped, data, resume=True)
        assert list_names(stopped) == [
            "adapter", "importance.safetensors", "log.jsonl", "manifest.json", "plan.json",
            "recipe.yaml",
        ]  # fmt: skip
