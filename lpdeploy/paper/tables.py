"""The tables and figures of the paper, and three of ours, as data: rows, and what is measured."""

from collections.abc import Mapping
from typing import Any

from lpdeploy.paper.table import Row, Table
from lpdeploy.presets import PRESETS
from lpdeploy.ramps import RAMPS

SIMILARITY_SAMPLES = 128
"""Number of sequences that the groups are scored on for both masks of Figure 4."""

_8BIT = {"criterion": "lora", "load_in": "8bit"}
_DENSE = Row("dense", "unpruned", dense=True)
_LORA = Row("lora", "LoRAPrune (lora)", {"criterion": "lora"})
_LORA_GROUPS = Row(
    "lora-groups",
    "LoRAPrune, LoRA started by groups (not in the paper)",
    {"criterion": "lora", "lora_init": "groups"},
)
# All rows of a table have the learning rate and the rank that the user gives.
_SHARED = ("lr", "lora_rank", "lora_alpha")
_RECIPE = {name: value for name, value in PRESETS["best"].items() if name not in _SHARED}
_BEST = Row("recipe", "the recipe (not in the paper)", _RECIPE)
_CRITERIA = (
    _DENSE,
    Row("magnitude", "Magnitude", {"criterion": "magnitude"}),
    Row("wanda", "WANDA", {"criterion": "wanda"}),
    Row("gradient", "LLM-Pruner (gradient)", {"criterion": "gradient"}),
    Row("lora-8bit", "LoRAPrune-8bit (lora)", _8BIT),
    _LORA,
    _LORA_GROUPS,
    Row("gate", "gate (not in the paper)", {"criterion": "gate"}),
    Row("random", "random (not in the paper)", {"criterion": "random"}),
    _BEST,
)
_COST = (
    "The runs are separate processes, one at a time, and the rows take turns. Other work on the "
    "machine adds to the times. s/iter and scoring are medians over all scored steps except the "
    "first, and the model shrinks during a run. Total time is that of prune."
)
_JOINT = {"schedule": "joint"}
_EARLY = {"ramp": "early", **_JOINT}
_COLD = {"calibration_samples": 0}
_EARLY_HOLD = round(1 - RAMPS["early"].cooldown, 6)
_REFIT = {"refit": True}
_SLOW, _FAST = {"lr": 1e-3}, {"lr": 3e-3}
_OBS = {"criterion": "obs"}
_GATE, _DISTILL, _DEPTH = {"criterion": "gate"}, {"distill": 0.5}, {"depth": "auto"}
_ALL: Mapping[str, Any] = {**_JOINT, **_GATE, **_REFIT, **_DISTILL, **_DEPTH, **_FAST}
_ONE_SHOT = {"schedule": "one-shot", "calibration_samples": SIMILARITY_SAMPLES}

_AT_ONCE = {"schedule": "one-shot"}
_RECIPE_AT_ONCE = {**_AT_ONCE, **_GATE, **_REFIT, **_DEPTH}


def _leave_out(option: str) -> Mapping[str, Any]:
    return {name: value for name, value in _ALL.items() if name != option}


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "2",
            "Pruning criteria, fine-tuned on instructions",
            "The paper fine-tunes LLaMA-7B on LaMini and measures perplexity on WikiText2 and PTB, "
            "in segments of 2,048 tokens, and zero-shot accuracy.",
            _CRITERIA,
            (0.2, 0.3, 0.5),
        ),
        Table(
            "4",
            "What each pruning criterion costs",
            f"The paper prunes LLaMA-7B with batches of 128, one sequence per pass. {_COST}",
            (
                Row("gradient", "Vanilla (gradient)", {"criterion": "gradient"}),
                Row("magnitude", "Magnitude", {"criterion": "magnitude"}),
                Row("lora", "LoRA-guided (lora)", {"criterion": "lora"}),
                Row("lora-8bit", "LoRA-guided (8-bit)", _8BIT),
            ),
            (0.5,),
            kind="cost",
        ),
        Table(
            "5",
            "Pruning criteria, fine-tuned on plain text",
            "The paper fine-tunes LLaMA-7B on 20k samples of C4 and measures zero-shot accuracy.",
            _CRITERIA,
            (0.2, 0.5),
        ),
        Table(
            "6",
            "LoRA's gradients against the true gradients, kept in CPU memory",
            f"The paper prunes LLaMA-7B. {_COST}",
            (
                Row("gradient", "LLM-Pruner (gradient)", {"criterion": "gradient"}),
                Row(
                    "gradient-offload",
                    "LLM-Pruner + CPU offloading",
                    {"criterion": "gradient", "offload_gradients": True},
                ),
                _LORA,
            ),
            (0.5,),
            kind="cost",
        ),
        Table(
            "7",
            "Joint or separate pruning and fine-tuning",
            "The paper prunes LLaMA-7B during fine-tuning on 20k samples of C4, or once before it.",
            (
                Row("joint", "Joint", {"schedule": "joint"}),
                Row("separate", "Separate", {"schedule": "separate"}),
            ),
            (0.2, 0.5),
        ),
        Table(
            "8",
            "Steps between pruning events",
            "The paper prunes LLaMA-7B every 1, 5, 10 and 20 iterations of fine-tuning on C4.",
            tuple(
                Row(f"every-{count}", f"every {count}", {"prune_every": count}, place=count)
                for count in (1, 5, 10, 20)
            ),
            (0.5,),
            axis="steps between pruning events",
        ),
        Table(
            "9",
            "What pruned models write",
            "The paper gives LLaMA-7B, unpruned and pruned by 20%, an instruction about common "
            "sense, one to translate and one to write code.",
            (_DENSE, _LORA, _BEST),
            (0.2,),
            kind="texts",
        ),
        Table(
            "figure-4",
            "Masks from LoRA's gradients against masks from the true gradients",
            f"Both criteria score the groups once, on {SIMILARITY_SAMPLES} sequences, and remove "
            "the same share of each layer. Agreement (the paper's similarity) is the share of "
            "groups that both masks keep or both remove. Jaccard is the number of groups that both "
            "remove, divided by the number that either removes. Random is the value expected of "
            "two random masks.",
            (
                Row("lora", "lora", {"criterion": "lora", **_ONE_SHOT}),
                Row("gradient", "gradient", {"criterion": "gradient", **_ONE_SHOT}),
            ),
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
            kind="similarity",
        ),
        Table(
            "figure-6",
            "Moving average, and fine-tuning steps",
            "The paper varies lambda of Eq. 11 and the number of iterations, on 20k samples of C4.",
            (
                *(
                    Row(
                        f"ema-{decay:g}",
                        f"lambda {decay:g}",
                        {"ema_decay": decay},
                        place=decay,
                        panel="lambda of the moving average",
                    )
                    for decay in (0.0, 0.3, 0.6, 0.9, 0.99)
                ),
                *(
                    Row(
                        f"steps-{factor:g}x",
                        f"{factor:g} x steps",
                        step_factor=factor,
                        place=factor,
                        panel="steps, against those given",
                    )
                    for factor in (0.25, 0.5, 1.0, 2.0)
                ),
            ),
            (0.5,),
        ),
        Table(
            "forms",
            "How the scores of weights are combined into the score of a group",
            "Not in the paper, which sums squares. The authors' experiments sum absolute values, "
            "divided by their L2 norm in each linear layer.",
            tuple(
                Row(
                    form + ("-normalized" if normalize else ""),
                    form + (", L2-normalized" if normalize else ""),
                    {"criterion": "lora", "score_form": form, "normalize": normalize},
                )
                for form in ("squared", "absolute")
                for normalize in (False, True)
            ),
            (0.5,),
        ),
        Table(
            "ramps",
            "When groups are removed, and when the learning rate falls",
            "Not in the paper, which leaves the schedule open. Two rows use the early ramp without "
            "its calibration or without its held learning rate. The last row gives separate "
            "pruning the learning rate of the early ramp.",
            (
                *(Row(ramp, f"joint, {ramp}", {"ramp": ramp, **_JOINT}) for ramp in RAMPS),
                Row("early-no-hold", "joint, early, rate not held", {**_EARLY, "lr_hold": 0.0}),
                Row("early-cold", "joint, early, no calibration", {**_EARLY, **_COLD}),
                Row("separate", "separate", {"schedule": "separate", "ramp": "early"}),
                Row(
                    "separate-hold",
                    "separate, rate held as in early",
                    {"schedule": "separate", "ramp": "early", "lr_hold": _EARLY_HOLD},
                ),
            ),
            (0.2, 0.5, 0.7),
        ),
        Table(
            "refit",
            "Solving the remaining weights again when groups are removed",
            "Not in the paper. The refit solves the remaining columns of o_proj and down_proj by "
            "least squares at each event. One-shot rows are not fine-tuned.",
            (
                Row("one-shot", "one-shot", {"schedule": "one-shot"}),
                Row("one-shot-refit", "one-shot, refit", {"schedule": "one-shot", **_REFIT}),
                Row(
                    "one-shot-gate", "one-shot, gate", {"schedule": "one-shot", "criterion": "gate"}
                ),
                Row(
                    "one-shot-gate-refit",
                    "one-shot, gate, refit",
                    {"schedule": "one-shot", "criterion": "gate", **_REFIT},
                ),
                Row("joint", "joint, learning rate 1e-3", {**_JOINT, **_SLOW}),
                Row(
                    "joint-refit",
                    "joint, refit, learning rate 1e-3",
                    {**_JOINT, **_REFIT, **_SLOW},
                ),
                Row("joint-fast", "joint, learning rate 3e-3", {**_JOINT, **_FAST}),
                Row(
                    "joint-refit-fast",
                    "joint, refit, learning rate 3e-3",
                    {**_JOINT, **_REFIT, **_FAST},
                ),
                Row(
                    "joint-gate-refit-fast",
                    "joint, gate, refit, learning rate 3e-3",
                    {"criterion": "gate", **_JOINT, **_REFIT, **_FAST},
                ),
            ),
            (0.2, 0.5, 0.7),
        ),
        Table(
            "recovery",
            "What each part of the recipe gives",
            "Not in the paper. The recipe is the gate criterion, a refit at each event, "
            "distillation from the unpruned model, dropped layers (--depth auto) and a learning "
            "rate of 3e-3. All rows of a ratio leave as many parameters, but for rounding. "
            "One-shot rows are not fine-tuned.",
            (
                Row("one-shot", "one-shot, lora", _AT_ONCE),
                Row("one-shot-refit", "one-shot, lora, refit", {**_AT_ONCE, **_REFIT}),
                Row(
                    "one-shot-refit-8bit",
                    "one-shot, lora, refit, 8-bit base",
                    {**_AT_ONCE, **_REFIT, "load_in": "8bit"},
                ),
                Row("one-shot-width", "one-shot, gate, refit", {**_AT_ONCE, **_GATE, **_REFIT}),
                Row("one-shot-depth", "one-shot, gate, refit, depth", _RECIPE_AT_ONCE),
                Row("one-shot-obs", "one-shot, obs, refit", {**_AT_ONCE, **_OBS, **_REFIT}),
                Row(
                    "one-shot-obs-depth",
                    "one-shot, obs, refit, depth",
                    {**_RECIPE_AT_ONCE, **_OBS},
                ),
                Row("slow", "LoRAPrune, learning rate 1e-3", {**_JOINT, **_SLOW}),
                Row("fast", "LoRAPrune", {**_JOINT, **_FAST}),
                Row("gate", "with gate alone", {**_JOINT, **_FAST, **_GATE}),
                Row("refit", "with the refit alone", {**_JOINT, **_FAST, **_REFIT}),
                Row("distill", "with distillation alone", {**_JOINT, **_FAST, **_DISTILL}),
                Row("depth", "with depth alone", {**_JOINT, **_FAST, **_DEPTH}),
                Row("all", "the recipe", _ALL),
                Row("all-lora", "the recipe, lora for gate", {**_ALL, "criterion": "lora"}),
                Row("all-obs", "the recipe, obs for gate", {**_ALL, **_OBS}),
                Row("all-no-refit", "the recipe without the refit", _leave_out("refit")),
                Row("all-no-distill", "the recipe without distillation", _leave_out("distill")),
                Row("all-width", "the recipe without depth", _leave_out("depth")),
                Row("all-slow", "the recipe, learning rate 1e-3", {**_ALL, **_SLOW}),
            ),
            (0.5,),
        ),
        Table(
            "recipe",
            "LoRAPrune and the recipe",
            "Not in the paper. The recipe is that of the table above. Both have the better of the "
            "learning rates 1e-3 and 3e-3. All rows of a ratio leave as many parameters, but for "
            "rounding. One-shot rows are not fine-tuned.",
            (
                _DENSE,
                Row("one-shot", "one-shot, lora", _AT_ONCE),
                Row("one-shot-width", "one-shot, gate, refit", {**_AT_ONCE, **_GATE, **_REFIT}),
                Row("one-shot-depth", "one-shot, gate, refit, depth", _RECIPE_AT_ONCE),
                Row("one-shot-obs", "one-shot, obs, refit", {**_AT_ONCE, **_OBS, **_REFIT}),
                Row(
                    "one-shot-obs-depth",
                    "one-shot, obs, refit, depth",
                    {**_RECIPE_AT_ONCE, **_OBS},
                ),
                Row("fast", "LoRAPrune", {**_JOINT, **_FAST}),
                Row("all-width", "the recipe without depth", _leave_out("depth")),
                Row("all", "the recipe", _ALL),
                Row("all-obs", "the recipe, obs for gate", {**_ALL, **_OBS}),
            ),
            (0.2, 0.5, 0.7),
        ),
        Table(
            "settings",
            "The recipe with other settings",
            "Not in the paper. Each row changes one setting of the recipe: how much distillation "
            "weighs and what it keeps, the rank of LoRA, or when groups are removed.",
            (
                Row("all", "the recipe", _ALL),
                Row("distill-0.25", "distillation 0.25 for 0.5", {**_ALL, "distill": 0.25}),
                Row("distill-0.9", "distillation 0.9 for 0.5", {**_ALL, "distill": 0.9}),
                Row("distill-1", "distillation alone, no text", {**_ALL, "distill": 1.0}),
                Row("distill-warm", "temperature 2 for 1", {**_ALL, "distill_temperature": 2.0}),
                Row("distill-few", "16 tokens kept for 128", {**_ALL, "distill_top_k": 16}),
                Row("rank-4", "rank 4 for 8", {**_ALL, "lora_rank": 4, "lora_alpha": 8.0}),
                Row("rank-32", "rank 32 for 8", {**_ALL, "lora_rank": 32, "lora_alpha": 64.0}),
                Row("separate", "separate for joint", {**_ALL, "schedule": "separate"}),
            ),
            (0.5,),
        ),
        Table(
            "rates",
            "The learning rate of LoRAPrune and of the recipe",
            "Not in the paper.",
            tuple(
                Row(f"{name}-{rate}", f"{label}, {rate}", {**options, "lr": float(rate)})
                for name, label, options in (
                    ("loraprune", "LoRAPrune", _JOINT),
                    ("recipe", "the recipe", _ALL),
                )
                for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
            ),
            (0.5,),
        ),
    )
}
